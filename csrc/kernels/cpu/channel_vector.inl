// Entries of a per-channel parameter or buffer of any floating dtype, as doubles. They are taken to and from arrays, a
// few channels at once, so that the loops over the formulas in between are arithmetic alone, which compilers vectorize.
inline constexpr int64_t kEntries = 64;

// Every NaN becomes the one that arithmetic makes, because round_to_bfloat16 relies on a NaN's low bits.
template <class T>
void read_as(const void* data, int64_t c0, int64_t n, double* entries) {
  const Vec<double> nan = broadcast(std::numeric_limits<double>::quiet_NaN());
  for_each_vector<double>(n, [&](int64_t i, auto width) {
    const Vec<double> value = load<double>(static_cast<const T*>(data) + c0 + i, width);
    store(entries + i, value == value ? value : nan, width);
  });
}

template <class T>
void write_as(void* data, int64_t c0, int64_t n, const double* entries) {
  using S = compute_t<T>;
  for (int64_t i = 0; i < n; ++i)
    store(static_cast<T*>(data) + c0 + i, broadcast<S>(static_cast<S>(entries[i])), Part{1});
}

// Reads n entries from c0 on; where the vector is absent all are `absent`.
void read(const ChannelVector& vector, int64_t c0, int64_t n, double absent, double* entries) {
  if (!vector) {
    for (int64_t i = 0; i < n; ++i) entries[i] = absent;
    return;
  }
  switch (vector.dtype) {
    case DType::kFloat64:
      return read_as<double>(vector.data, c0, n, entries);
    case DType::kFloat16:
      return read_as<Half>(vector.data, c0, n, entries);
    case DType::kBFloat16:
      return read_as<BFloat16>(vector.data, c0, n, entries);
    default:
      return read_as<float>(vector.data, c0, n, entries);
  }
}

// Writes n entries from c0 on; nothing where the vector is absent.
void write(const ChannelVector& vector, int64_t c0, int64_t n, const double* entries) {
  if (!vector) return;
  switch (vector.dtype) {
    case DType::kFloat64:
      return write_as<double>(vector.data, c0, n, entries);
    case DType::kFloat16:
      return write_as<Half>(vector.data, c0, n, entries);
    case DType::kBFloat16:
      return write_as<BFloat16>(vector.data, c0, n, entries);
    default:
      return write_as<float>(vector.data, c0, n, entries);
  }
}

// Calls f(c0, n) for ranges of channels that fit the arrays.
template <class F>
NF_FN void for_entries(int64_t c0, int64_t c1, const F& f) {
  for (; c0 < c1; c0 += kEntries) f(c0, least(kEntries, c1 - c0));
}
