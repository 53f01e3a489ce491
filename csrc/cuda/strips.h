// How an image batch is cut into the blocks of a launch.
//
// An image is cut into vertical strips and each strip into bands of rows; a block goes down the rows of one band. A row
// of a strip is one word of neighbouring pixels for each of `slots` threads; `groups` such sets of threads share the
// classes. A strip computes `halo` pixels beyond its own on either side, and a band `radius` rows above and below
// itself, whose gradient others write.
#pragma once

#include <algorithm>
#include <cstdint>

namespace eroseg::cuda {

constexpr int kSlotsOfWarp = 32;
struct Strips {
  int count;   // strips of an image
  int width;   // own pixels of a strip, whole words
  int halo;    // pixels beyond them on either side, whole words; 0 if there is one strip only
  int slots;   // threads that share a row, whole warps
  int groups;  // threads that share a pixel's classes
  int bands;   // of a strip
  int rows;    // own rows of a band
};

// The widths with the fewest warps per row of the image; of equal ones the widest strips, which overlap the least. A
// block has at most `most_threads`, or one warp for each group.
inline Strips cut_strips(int64_t width, int radius, int pixels_of_word, int groups, int most_threads) {
  const auto words = [&](int64_t pixels) { return (pixels + pixels_of_word - 1) / pixels_of_word; };
  const int64_t total = std::max<int64_t>(words(width), 1);
  Strips best{};
  int64_t best_slots = 0;
  for (int64_t count = 1; count <= total; ++count) {
    const int64_t own = (total + count - 1) / count;
    const int64_t halo = count == 1 ? 0 : words(radius);
    const int64_t slots = (own + 2 * halo + kSlotsOfWarp - 1) / kSlotsOfWarp * kSlotsOfWarp;
    const int64_t strips = (total + own - 1) / own;
    if (slots * groups <= std::max(most_threads, kSlotsOfWarp * groups) &&
        (best_slots == 0 || strips * slots < best_slots)) {
      best_slots = strips * slots;
      best = {static_cast<int>(strips),
              static_cast<int>(own * pixels_of_word),
              static_cast<int>(halo * pixels_of_word),
              static_cast<int>(slots),
              groups,
              1,
              1};
    }
    if (slots == kSlotsOfWarp) break;  // narrower strips have the same warps, and more of them
  }
  return best;
}

// Bands such that the last block ends soonest, if `resident` blocks run at a time and all rows take equally long.
inline void cut_bands(Strips& strips, int64_t batch, int64_t height, int radius, int resident) {
  int64_t best = 0;
  for (int64_t bands = 1; bands <= std::min<int64_t>(height, 256); ++bands) {
    const int64_t rows = (height + bands - 1) / bands;
    const int64_t blocks = batch * strips.count * ((height + rows - 1) / rows);
    const int64_t waves = (blocks + resident - 1) / resident;
    const int64_t time = waves * (rows + 2 * radius + 1);
    if (best == 0 || time < best) {
      best = time;
      strips.rows = static_cast<int>(rows);
      strips.bands = static_cast<int>((height + rows - 1) / rows);
    }
  }
}

}  // namespace eroseg::cuda
