// How an image batch is cut into the blocks of a launch.
//
// An image is cut into vertical strips and each strip into bands of rows; a block goes over the rows of one band. A row
// of a strip is one word of neighbouring pixels for each of `slots` sets of `groups` threads, which share the classes.
// A strip computes `halo` pixels beyond its own on either side, and a band `radius` rows above and below itself, whose
// gradient others write.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../pixel_math.h"

namespace eroseg::cuda {

struct Strips {
  int count = 0;   // strips of an image
  int width = 0;   // own pixels of a strip, whole units
  int halo = 0;    // pixels beyond them on either side, whole words; 0 if there is one strip only
  int slots = 0;   // threads that share a row
  int groups = 0;  // threads that share a pixel's classes
  int bands = 0;   // of a strip
  int rows = 0;    // own rows of a band

  int threads() const { return slots * groups; }
  int64_t blocks_of_image() const { return static_cast<int64_t>(count) * bands; }
};

// What a cut has to keep to.
struct StripLimits {
  int radius;          // of what a pixel needs around it
  int pixels_of_word;  // a thread's
  int words_of_unit;   // strips begin at whole units
  int slots_of_step;   // slots are a multiple of it
  int groups;
  int most_threads;  // of a block
  int narrowest;     // pixels of a strip other than the last
};

// Calls f(strips) for every way to cut rows into strips, from wide to narrow ones. Bands are left to cut_bands.
template <class F>
void for_each_cut(int64_t width, const StripLimits& limits, const F& f) {
  const auto up = [](int64_t n, int64_t step) { return (n + step - 1) / step; };
  const int64_t unit = limits.pixels_of_word * static_cast<int64_t>(limits.words_of_unit);
  const int64_t total = std::max<int64_t>(up(width, unit), 1);
  int64_t last_own = 0;
  for (int64_t count = 1; count <= total; ++count) {
    const int64_t own = up(total, count);
    if (count > 1 && own * unit < limits.narrowest) break;
    if (own == last_own) continue;
    last_own = own;
    const int64_t halo = count == 1 ? 0 : up(limits.radius, limits.pixels_of_word);
    const int64_t slots = up(own * limits.words_of_unit + 2 * halo, limits.slots_of_step) * limits.slots_of_step;
    if (slots * limits.groups > limits.most_threads) continue;
    Strips strips;
    strips.count = static_cast<int>(up(total, own));
    strips.width = static_cast<int>(own * unit);
    strips.halo = static_cast<int>(halo * limits.pixels_of_word);
    strips.slots = static_cast<int>(slots);
    strips.groups = limits.groups;
    f(strips);
    if (slots == limits.slots_of_step) break;  // narrower strips have as many threads, and there are more of them
  }
}

// The blocks of a strip at most, so that what they add up to is bounded.
constexpr int64_t kMostBands = 256;

// Cuts strips into bands such that the launch ends soonest, and returns how long it takes then.
// `resident` blocks fit a multiprocessor, of which there are `processors`; row_time(n) is how long n blocks there take
// for a row each. A block has `radius` rows more to reduce on either side, and one more until its pipeline has filled.
template <class RowTime>
double cut_bands(Strips& strips, int64_t batch, int64_t height, int radius, int64_t processors, int64_t resident,
                 const RowTime& row_time) {
  double least = 0;
  for (int64_t bands = 1; bands <= std::min(height, kMostBands); ++bands) {
    const int64_t rows = (height + bands - 1) / bands;
    const int64_t blocks = batch * strips.count * ((height + rows - 1) / rows);
    const int64_t waves = blocks / (processors * resident), rest = blocks % (processors * resident);
    const double rows_of_all = static_cast<double>(waves) * row_time(resident) +
                               (rest > 0 ? row_time((rest + processors - 1) / processors) : 0.0);
    const double time = static_cast<double>(rows + 2 * radius + 1) * rows_of_all;
    if (strips.rows == 0 || time < least) {
      least = time;
      strips.rows = static_cast<int>(rows);
      strips.bands = static_cast<int>((height + rows - 1) / rows);
    }
  }
  return least;
}

}  // namespace eroseg::cuda
