// Blocks of logits or gradient in memory: kBlock pixels of a row in all classes, in either layout. Part of
// kernels_impl.h.

namespace eroseg::cpu::EROSEG_LEVEL {
namespace {

// The position of a row's pixels [x, x + kBlock) in logits or gradient. Binary segmentation's class 0 exists in scratch
// memory only: the tensors start at first_class.
struct BlockInMemory {
  BlockInMemory(const Input& input, int64_t image, int64_t y, int64_t x)
      : channels(input.shape.channels),
        first_class(input.shape.classes() - channels),
        class_stride(input.logits.channels_last ? 1 : input.logits.pixels()),
        pixel_stride(input.logits.channels_last ? channels : 1),
        offset(image * channels * input.logits.pixels() + (y * input.logits.width + x) * pixel_stride),
        n(input.logits.width - x < kBlock ? input.logits.width - x : kBlock),
        planes(n == kBlock && pixel_stride == 1),
        pixels(n == kBlock && class_stride == 1 && channels >= kLanes) {}
  int64_t channels, first_class, class_stride, pixel_stride, offset, n;
  bool planes;  // whether every class's pixels can be loaded and stored as vectors
  bool pixels;  // whether every pixel's classes can
};

// Blocks at the right edge, and channels_last memory with few classes, go through a buffer in the type of the logits,
// so that conversion is by vectors there as well. Its tiles are as many classes as a cache line of channels_last
// float32 holds.
constexpr int64_t kTile = 16;

template <class Type>
void gather_block(const BlockInMemory& block, const typename Type::Element* from, float* z) {
  typename Type::Element buffer[kTile][kBlock] = {};
  for (int64_t first = 0; first < block.channels; first += kTile) {
    const int64_t tile = block.channels - first < kTile ? block.channels - first : kTile;
    const auto* corner = from + first * block.class_stride;
    for (int64_t i = 0; i < block.n; ++i) {
      for (int64_t c = 0; c < tile; ++c) buffer[c][i] = corner[c * block.class_stride + i * block.pixel_stride];
    }
    for (int64_t c = 0; c < tile; ++c) {
      float* row = z + (first + c) * kBlock;
      for (int u = 0; u < kUnroll; ++u) store(row + u * kLanes, Type::load_vector(buffer[c] + u * kLanes));
    }
  }
}

template <class Type>
void scatter_block(const BlockInMemory& block, const float* g, typename Type::Element* to) {
  typename Type::Element buffer[kTile][kBlock];
  for (int64_t first = 0; first < block.channels; first += kTile) {
    const int64_t tile = block.channels - first < kTile ? block.channels - first : kTile;
    for (int64_t c = 0; c < tile; ++c) {
      const float* row = g + (first + c) * kBlock;
      for (int u = 0; u < kUnroll; ++u) store(buffer[c] + u * kLanes, Type::pack(load<F>(row + u * kLanes)));
    }
    auto* corner = to + first * block.class_stride;
    for (int64_t i = 0; i < block.n; ++i) {
      for (int64_t c = 0; c < tile; ++c) corner[c * block.class_stride + i * block.pixel_stride] = buffer[c][i];
    }
  }
}

// Calls f(first) for tiles of kLanes classes that cover all of them; the last overlaps the one before it.
template <class Call>
EROSEG_INLINE void for_tiles(int64_t channels, const Call& f) {
  for (int64_t first = 0; first < channels; first += kLanes) {
    f(first + kLanes <= channels ? first : channels - kLanes);
  }
}

// A whole block of channels_last pixels with at least kLanes classes: squares of pixels and classes are transposed in
// registers.
template <class Type>
void gather_pixels(const typename Type::Element* from, int64_t channels, float* z) {
  for (int u = 0; u < kUnroll; ++u) {
    for_tiles(channels, [&](int64_t first) {
      F square[kLanes];
      for (int i = 0; i < kLanes; ++i) square[i] = Type::load_vector(from + (u * kLanes + i) * channels + first);
      transpose(square);
      for (int c = 0; c < kLanes; ++c) store(z + (first + c) * kBlock + u * kLanes, square[c]);
    });
  }
}

// A block's logits as [channels][kBlock] floats.
template <class Type>
void read_block(const BlockInMemory& block, const typename Type::Element* from, float* z) {
  if (block.pixels) return gather_pixels<Type>(from, block.channels, z);
  if (!block.planes) return gather_block<Type>(block, from, z);
  for (int64_t c = 0; c < block.channels; ++c) {
    for (int u = 0; u < kUnroll; ++u) {
      store(z + c * kBlock + u * kLanes, Type::load_vector(from + c * block.class_stride + u * kLanes));
    }
  }
}

}  // namespace
}  // namespace eroseg::cpu::EROSEG_LEVEL
