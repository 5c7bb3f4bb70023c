// Entries of a per-channel parameter or buffer of any floating dtype, as double.

template <class T>
NF_FN double get_as(const void* data, int64_t c) {
  return static_cast<double>(load<compute_t<T>>(static_cast<const T*>(data) + c, Part{1})[0]);
}

template <class T>
NF_FN void set_as(void* data, int64_t c, double value) {
  using S = compute_t<T>;
  store(static_cast<T*>(data) + c, broadcast<S>(static_cast<S>(value)), Part{1});
}

NF_FN double get(const ChannelVector& vector, int64_t c) {
  switch (vector.dtype) {
    case DType::kFloat64:
      return get_as<double>(vector.data, c);
    case DType::kFloat16:
      return get_as<Half>(vector.data, c);
    case DType::kBFloat16:
      return get_as<BFloat16>(vector.data, c);
    default:
      return get_as<float>(vector.data, c);
  }
}

NF_FN void set(const ChannelVector& vector, int64_t c, double value) {
  switch (vector.dtype) {
    case DType::kFloat64:
      return set_as<double>(vector.data, c, value);
    case DType::kFloat16:
      return set_as<Half>(vector.data, c, value);
    case DType::kBFloat16:
      return set_as<BFloat16>(vector.data, c, value);
    default:
      return set_as<float>(vector.data, c, value);
  }
}
