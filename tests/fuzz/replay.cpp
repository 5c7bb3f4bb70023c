// Runs the inputs in files, then a number of random ones. For MemorySanitizer, under which libFuzzer itself fails: it
// calls functions of libstdc++ that are not instrumented.
//
//   replay COUNT FILE...
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>

extern "C" int LLVMFuzzerInitialize(int*, char***);
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

constexpr size_t kMostBytes = 192;

void run(const uint8_t* data, size_t size) {
  const std::unique_ptr<uint8_t[]> copy(new uint8_t[size]);  // of the exact size
  for (size_t i = 0; i < size; ++i) copy[i] = data[i];
  LLVMFuzzerTestOneInput(copy.get(), size);
}

}  // namespace

int main(int argc, char** argv) {
  LLVMFuzzerInitialize(&argc, &argv);
  uint8_t bytes[kMostBytes];
  for (int k = 2; k < argc; ++k) {
    std::FILE* const file = std::fopen(argv[k], "rb");
    if (file == nullptr) return 1;
    const size_t size = std::fread(bytes, 1, kMostBytes, file);
    std::fclose(file);
    run(bytes, size);
  }
  std::mt19937 random(1);
  const long count = std::atol(argv[1]);
  for (long k = 0; k < count; ++k) {
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
    run(bytes, kMostBytes);
  }
  std::printf("%d files, %ld random inputs\n", argc - 2, count);
}
