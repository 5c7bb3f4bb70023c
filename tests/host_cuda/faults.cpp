// The simulator's own test: kernels with one fault each, and some without a fault.
//
//   faults              runs the kernels whose faults the simulator itself must report, and prints the reports
//   faults NAME         runs one kernel whose fault a sanitizer must report; exits with 0 if the result is correct
#include <functional>
#include <map>
#include <memory>
#include <string>

#include "cuda_host.h"

using namespace cudahost;

namespace {

__global__ void reverse(const int* in, int* out) {
  NF_SHARED(int, s, [64]);
  s[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = s[63 - threadIdx.x];
}
__global__ void reverse_without_barrier(const int* in, int* out) {
  NF_SHARED(int, s, [64]);
  s[threadIdx.x] = in[threadIdx.x];
  out[threadIdx.x] = s[63 - threadIdx.x];
}
__global__ void overwritten_too_early(const int* in, int* out) {
  NF_SHARED(int, s, [64]);
  int a = 0;
  for (int round = 0; round < 2; ++round) {
    s[threadIdx.x] = in[threadIdx.x] + round;
    __syncthreads();
    a += s[63 - threadIdx.x];
  }
  out[threadIdx.x] = a;
}
template <bool kSynced>
__global__ void warp_sum(const int* in, int* out) {
  NF_SHARED(int, s, [32]);
  s[threadIdx.x] = in[threadIdx.x];
  for (unsigned step = 16; step > 0; step /= 2) {
    if (kSynced) __syncwarp();
    if (threadIdx.x < step) s[threadIdx.x] += s[threadIdx.x + step];
  }
  if (kSynced) __syncwarp();
  if (threadIdx.x == 0) out[0] = s[0];
}
__global__ void leaves_before_barrier(int* out) {
  if (threadIdx.x >= 40) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}
__global__ void divergent_barrier(int* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
    out[0] = 1;
  } else {
    __syncthreads();
    out[1] = 1;
  }
}
__global__ void shuffle_from_absent_lanes(float* out) {
  float v = 1;
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(~0u, v, step);
  out[threadIdx.x] = v;
}
__global__ void shuffle_in_branch(float* out) {
  float v = 1;
  if (threadIdx.x < 16) v += __shfl_xor_sync(~0u, v, 1);
  out[threadIdx.x] = v;
}
__global__ void shuffles_of_halves(float* out) {
  auto v = static_cast<float>(threadIdx.x);
  if (threadIdx.x % 32 < 16)
    for (int step = 8; step > 0; step /= 2) v += __shfl_xor_sync(0xffffu, v, step);
  else
    v += __shfl_down_sync(0xffff0000u, v, 1, 16);
  __syncwarp();
  out[threadIdx.x] = v;
}
__global__ void past_static(int* out) {
  NF_SHARED(int, s, [32]);
  s[threadIdx.x] = 0;
  __syncthreads();
  const int* p = s;
  out[0] = p[33];
}
__global__ void past_dynamic(int* out) {
  NF_DYNAMIC_SHARED(int, s);
  s[threadIdx.x] = 1;
  __syncthreads();
  out[0] = s[0];
}
__global__ void past_global(const int* in, int* out) { out[threadIdx.x] = in[threadIdx.x + (threadIdx.x == 63)]; }
__global__ void past_global_atomically(int* out) { atomicAdd(out + 64, 1); }
__global__ void misaligned(const int* in, int* out) {
  out[0] = static_cast<int>(__ldcs(reinterpret_cast<const uint4*>(in + 1)).x);
}
__global__ void skips_grid_barrier(int* out) {
  if (blockIdx.x == 1) return;
  cooperative_groups::this_grid().sync();
  out[blockIdx.x] = 1;
}
__global__ void blocks_race(int* out) { out[0] = static_cast<int>(blockIdx.x); }
__global__ void blocks_add(int* out) { out[0] += 1; }
__global__ void blocks_add_atomically(int* out) { atomicAdd(out, 1); }
// Counts the blocks, if they run one after another.
__global__ void adds_in_turn(int* out) {
  const int before = *static_cast<volatile int*>(out);
  __syncthreads();
  __syncthreads();  // where the first warp to pass the other barrier waits
  if (threadIdx.x == 0) *out = before + 1;
}
__global__ void hands_over(int* flag, int* out) {
  if (blockIdx.x == 0) {
    while (atomicAdd(flag, 0) == 0) __nanosleep(20);
    out[0] = 7;
  } else {
    atomicExch(flag, 1);
  }
}
__global__ void spins_forever(int* flag) {
  while (atomicAdd(flag, 0) == 0) __nanosleep(20);
}
__global__ void leaves_while_read(int* out) {
  NF_SHARED(int, s);
  auto cluster = cooperative_groups::this_cluster();
  if (threadIdx.x == 0) s = static_cast<int>(cluster.block_rank());
  cluster.sync();
  if (cluster.block_rank() == 0 && threadIdx.x == 0) out[0] = *cluster.map_shared_rank(&s, 1);
}

int failures = 0;

void expect(bool right, const std::string& name, const std::string& said) {
  std::printf("%s %-28s %s\n", right ? "ok    " : "FAILED", name.c_str(), said.c_str());
  failures += !right;
}

void expect_error(const std::string& name, const std::string& part, const std::function<void()>& launch) {
  try {
    launch();
    expect(false, name, "no error");
  } catch (const Error& error) {
    expect(std::string(error.what()).find(part) != std::string::npos, name, error.what());
  }
}

}  // namespace

int main(int argc, char** argv) {
  // Buffers of the exact size, so that AddressSanitizer guards both ends.
  const auto in = std::make_unique<int[]>(64), out = std::make_unique<int[]>(64);
  const auto floats = std::make_unique<float[]>(64);
  for (int i = 0; i < 64; ++i) in[i] = i + 1;
  const int* const x = in.get();
  int* const y = out.get();
  const auto config = [](unsigned grid, unsigned block) { return Config{dim3(grid), dim3(block)}; };
  const auto cooperative = [](unsigned grid, unsigned block) {
    return Config{dim3(grid), dim3(block), 0, nullptr, true, 1};
  };

  if (argc > 1) {
    // The host waits for the launch, so that reading its result and freeing its buffers are no races.
    const auto run_alone = [](const Config& launched, auto kernel, auto... arguments) {
      launch(launched, kernel, arguments...);
      synchronize();
    };
    const std::map<std::string, std::function<int()>> named{
        {"reverse", [&] { return run_alone(config(1, 64), reverse, x, y), out[0] - 64; }},
        {"reverse_without_barrier", [&] { return run_alone(config(1, 64), reverse_without_barrier, x, y), 0; }},
        {"overwritten_too_early", [&] { return run_alone(config(1, 64), overwritten_too_early, x, y), 0; }},
        {"warp_sum", [&] { return run_alone(config(1, 32), warp_sum<true>, x, y), out[0] - 528; }},
        {"warp_sum_unsynced", [&] { return run_alone(config(1, 32), warp_sum<false>, x, y), 0; }},
        {"past_static", [&] { return run_alone(config(1, 32), past_static, y), 0; }},
        {"past_dynamic", [&] { return run_alone(Config{dim3(1), dim3(32), 31 * sizeof(int)}, past_dynamic, y), 0; }},
        {"past_global", [&] { return run_alone(config(1, 64), past_global, x, y), 0; }},
        {"past_global_atomically", [&] { return run_alone(config(1, 1), past_global_atomically, y), 0; }},
        {"misaligned", [&] { return run_alone(config(1, 1), misaligned, x, y), 0; }},
        {"blocks_race", [&] { return run_alone(config(2, 1), blocks_race, y), 0; }},
        {"blocks_add", [&] { return run_alone(config(4, 1), blocks_add, y), 0; }},
        {"blocks_add_atomically", [&] { return run_alone(config(4, 32), blocks_add_atomically, y), out[0] - 128; }},
        {"leaves_while_read",
         [&] { return run_alone(Config{dim3(2), dim3(32), 0, nullptr, false, 2}, leaves_while_read, y), 0; }},
    };
    return named.at(argv[1])();
  }

  expect_error("leaves_before_barrier", "deadlock", [&] { launch(config(2, 64), leaves_before_barrier, y); });
  expect_error("divergent_barrier", "faults.cpp", [&] { launch(config(1, 64), divergent_barrier, y); });
  expect_error("shuffle_from_absent_lanes", "takes no part",
               [&] { launch(config(1, 48), shuffle_from_absent_lanes, floats.get()); });
  expect_error("shuffle_in_branch", "exit", [&] { launch(config(1, 64), shuffle_in_branch, floats.get()); });
  expect_error("skips_grid_barrier", "deadlock", [&] { launch(cooperative(3, 64), skips_grid_barrier, y); });
  expect_error("not cooperative", "without a cooperative", [&] { launch(config(3, 64), skips_grid_barrier, y); });
  expect_error("spins_forever", "deadlock", [&] { launch(config(1, 2), spins_forever, y); });
  expect_error("too many threads", "invalid launch", [&] { launch(config(1, 2048), blocks_add_atomically, y); });
  expect_error("too much shared memory", "shared memory",
               [&] { launch(Config{dim3(1), dim3(32), 230 << 10}, past_dynamic, y); });
  expect_error("half a cluster", "cluster",
               [&] { launch(Config{dim3(3), dim3(32), 0, nullptr, false, 2}, leaves_while_read, y); });
  out[0] = out[1] = 0;
  launch(cooperative(2, 1), hands_over, &out[1], &out[0]);
  expect(out[0] == 7, "hands_over", "");
  for (max_resident = 1; max_resident <= 4; ++max_resident) {
    out[0] = 0;
    const unsigned before = concurrent;
    launch(config(4, 64), adds_in_turn, y);
    expect((out[0] == 4) == (concurrent == before), "adds_in_turn",
           std::to_string(out[0]) + " of 4 with at most " + std::to_string(max_resident) + " at the same time");
  }
  max_resident = 1;
  if (order == 0) {
    out[0] = out[1] = 0;
    expect_error("waits for an absent block", "deadlock", [&] { launch(config(2, 1), hands_over, &out[1], &out[0]); });
  }
  launch(config(1, 64), shuffles_of_halves, floats.get());
  expect(floats[0] == 120 && floats[16] == 33 && floats[31] == 62, "shuffles_of_halves", "");
  return failures;
}
