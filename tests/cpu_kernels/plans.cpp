// Prints the plans of the norms whose statistics belong to a sample or a position, one per line.
#include <cstdio>

#include "kernels/cpu/plan.h"

using namespace normfused::cpu;

namespace {

long long wide(int64_t value) { return value; }

void print(const char* name, const int64_t (&shape)[2], const GroupPlan& plan) {
  std::printf("%s %lld, %lld: %lld statistics, %lld x %lld parts of %lld x %lld\n", name, wide(shape[0]),
              wide(shape[1]), wide(plan.statistics), wide(plan.row_parts), wide(plan.splits), wide(plan.row_block),
              wide(plan.position_block));
}

}  // namespace

int main() {
  const int64_t rows[][2] = {{1, 49}, {10, 4096}, {4, 65536}, {2, 1 << 20}};  // rows, positions
  for (const auto& shape : rows) print("rows", shape, plan_rows(shape[0], shape[1], 4));
  const int64_t columns[][2] = {{49, 16},    {1024, 80}, {4096, 40},
                                {65536, 16}, {256, 160}, {7, 1 << 15}};  // positions, bytes of each of 32 groups
  for (const auto& shape : columns) print("columns", shape, plan_columns(shape[0], 32, shape[1], 2));
  const int64_t layers[][2] = {{1, 4},    {64, 4},    {768, 2},   {768, 4},
                               {4096, 4}, {65536, 4}, {200000, 4}};  // values, bytes
  for (const auto& shape : layers) print("layer rows", shape, plan_layer_rows(shape[0], shape[1]));
  const int64_t images[][2] = {{96, 3136}, {384, 196}, {768, 49}, {100000, 1024}};  // channels, positions
  for (const auto& [channels, positions] : images)
    std::printf("layer columns %lld, %lld: blocks of %lld\n", wide(channels), wide(positions),
                wide(layer_column_block(channels, positions, 4)));
  const int64_t chunks[][2] = {{3, 512}, {64, 32768}, {4096, 6144}, {100352, 768}};  // rows, bytes of each
  for (const auto& [items, bytes] : chunks) {
    const ChunkPlan plan = plan_chunks(items, bytes, 16);
    std::printf("chunks %lld, %lld: %lld of %lld\n", wide(items), wide(bytes), wide(plan.chunks), wide(plan.block));
  }
}
