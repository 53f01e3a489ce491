// How an image batch is cut into the blocks of a launch.
//
// An image is cut into vertical strips and each strip into bands of rows; a block goes over the rows of one band. A row
// of a strip is one word of neighbouring pixels for each of `slots` sets of `groups` threads, which share the classes.
// A strip computes `halo` pixels beyond its own on either side, and a band `radius` rows above and below itself, whose
// gradient others write.
#pragma once

#include <algorithm>
#include <cstdint>

namespace eroseg::cuda {

struct Strips {
  int count;   // strips of an image; 0 if no cut is allowed
  int width;   // own pixels of a strip, whole units
  int halo;    // pixels beyond them on either side, whole words; 0 if there is one strip only
  int slots;   // threads that share a row
  int groups;  // threads that share a pixel's classes
  int bands;   // of a strip
  int rows;    // own rows of a band
};

// What a cut has to keep to.
struct StripLimits {
  int radius;          // of what a pixel needs around it
  int pixels_of_word;  // a thread's
  int words_of_unit;   // strips begin at whole units
  int slots_of_step;   // slots are a multiple of it
  int groups;
  int most_threads;  // of a block
};

// The cut that costs least, of equal ones the widest strips: cost(strips) is negative for what is not possible. No
// strip but the last is narrower than `narrowest` pixels. Without a possible cut, the count is 0.
template <class Cost>
Strips cut_strips(int64_t width, const StripLimits& limits, int narrowest, const Cost& cost) {
  const auto up = [](int64_t n, int64_t step) { return (n + step - 1) / step; };
  const int64_t unit = limits.pixels_of_word * static_cast<int64_t>(limits.words_of_unit);
  const int64_t total = std::max<int64_t>(up(width, unit), 1);
  Strips best{};
  double least = 0;
  for (int64_t count = 1; count <= total; ++count) {
    const int64_t own = up(total, count);
    if (count > 1 && own * unit < narrowest) break;
    const int64_t halo = count == 1 ? 0 : up(limits.radius, limits.pixels_of_word);
    const int64_t slots = up(own * limits.words_of_unit + 2 * halo, limits.slots_of_step) * limits.slots_of_step;
    if (slots * limits.groups > limits.most_threads) continue;
    const Strips strips{static_cast<int>(up(total, own)),
                        static_cast<int>(own * unit),
                        static_cast<int>(halo * limits.pixels_of_word),
                        static_cast<int>(slots),
                        limits.groups,
                        1,
                        1};
    const double costs = cost(strips);
    if (costs >= 0 && (best.count == 0 || costs < least)) {
      best = strips;
      least = costs;
    }
    if (slots == limits.slots_of_step) break;  // narrower strips have as many threads, and there are more of them
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
