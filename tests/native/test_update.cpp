// Tests the native update and the job that runs it beside the program; called by test_memory.cpp.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#include "check.h"
#include "formats.h"
#include "update_job.h"

namespace {

using ldft::Type;

// Update one partition, on threads that start and end with it.
void update_all(const ldft::Rule& rule, const ldft::Partition& partition) {
  ldft::UpdateJob job;
  job.add(rule, partition);
  job.start(4, 0);
  job.finish();
}

// Against the rules in double precision, on sizes around those of vectors, blocks and pieces, and many threads.
void updates_are_those_of_the_rules() {
  for (const std::size_t count : {0, 1, 15, 17, 1023, 1025, 131071, 300001}) {
    std::mt19937 random(static_cast<unsigned>(count));
    std::normal_distribution<float> normal;
    std::vector<float> w(count), g(count), m(count), v(count);
    for (std::size_t i = 0; i < count; ++i) {
      w[i] = normal(random), g[i] = normal(random), m[i] = normal(random), v[i] = normal(random) * normal(random);
      v[i] = std::fabs(v[i]);
    }
    const auto w0 = w, g0 = g, m0 = m, v0 = v;
    std::vector<std::uint16_t> copy(count);
    const ldft::AdamW rule{0.25f, 0.9f, 0.95f, 1e-8f, 1.5f, -1e-2f, -1e-3f};
    update_all(rule, {w.data(), g.data(), Type::fp32, m.data(), v.data(), copy.data(), Type::bf16, count});
    for (std::size_t i = 0; i < count; ++i) {
      const double gradient = 0.25 * g0[i];
      const double mean = 0.9f * double{m0[i]} + (1 - double{0.9f}) * gradient;
      const double square = 0.95f * double{v0[i]} + (1 - double{0.95f}) * gradient * gradient;
      const double weight = w0[i] * (1 - double{1e-3f}) - 1e-2f * mean / (1.5 * std::sqrt(square) + 1e-8f);
      CHECK(std::fabs(m[i] - mean) < 1e-6 && std::fabs(v[i] - square) < 1e-6 * (1 + square));
      CHECK(std::fabs(w[i] - weight) < 1e-6 * (1 + std::fabs(weight)));
      CHECK(std::fabs(ldft::Bf16::wide(copy[i]) - w[i]) <= std::fabs(w[i]) / 256);
    }
    CHECK(g == g0);
    w = w0, m = m0;
    update_all(ldft::Lion{0.25f, 0.9f, 0.95f, 1e-2f, 0.1f},
               {w.data(), g.data(), Type::fp32, m.data(), nullptr, nullptr, Type::fp32, count});
    for (std::size_t i = 0; i < count; ++i) {
      const double direction = 0.9f * double{m0[i]} + (1 - double{0.9f}) * 0.25 * g0[i];
      const double weight = w0[i] * (1 - 1e-3) - std::copysign(1e-2, direction);
      if (std::fabs(direction) > 1e-6) CHECK(std::fabs(w[i] - weight) < 1e-6 * (1 + std::fabs(weight)));
      const double mean = 0.95f * double{m0[i]} + (1 - double{0.95f}) * 0.25 * g0[i];
      CHECK(std::fabs(m[i] - mean) < 1e-6);
    }
  }
}

// Parameters of one job: of many sizes, one larger than a piece.
struct Parameters {
  std::vector<std::vector<float>> w, g, m, v;
  std::vector<std::size_t> counts;
  explicit Parameters(std::size_t number) {
    for (std::size_t p = 0; p < number; ++p) {
      const std::size_t count = p % 5 == 1 ? 3 * ldft::kPiece + p : 1000 + p;
      counts.push_back(count);
      for (auto* all : {&w, &g, &m, &v}) all->emplace_back(count, 0.5f);
    }
  }
  void add_to(ldft::UpdateJob& job) {
    const ldft::AdamW rule{1.0f, 0.9f, 0.95f, 1e-8f, 1.5f, -1e-2f, 0.0f};
    for (std::size_t p = 0; p < w.size(); ++p) {
      job.add(rule, {w[p].data(), g[p].data(), Type::fp32, m[p].data(), v[p].data(), nullptr, Type::fp32, counts[p]});
    }
  }
  bool updated(std::size_t p) const {
    for (const float weight : w[p]) {
      if (weight == 0.5f) return false;
    }
    return true;
  }
};

// Whoever waits for a parameter sees all of it updated, in any order and with any number of threads.
void a_wait_ends_when_the_parameter_is_updated() {
  std::mt19937 random(5);
  for (std::size_t round = 0; round < 20; ++round) {
    Parameters all(12);
    std::vector<std::size_t> order(all.w.size());
    std::iota(order.begin(), order.end(), 0);
    if (round % 2 == 1) std::shuffle(order.begin(), order.end(), random);
    ldft::UpdateJob job;
    all.add_to(job);
    job.start(round % 4, 0);
    for (const std::size_t p : order) {
      job.wait(p);
      CHECK(all.updated(p));
    }
    job.finish();
    const auto told = job.progress();
    std::size_t elements = 0;
    for (const std::size_t count : all.counts) elements += count;
    CHECK(job.done() && told.bytes == 28 * elements && told.beside <= told.bytes);
    CHECK(told.waited_s >= 0 && told.seconds >= told.waited_s * 0.5);
    if (round % 4 == 0) CHECK(told.beside == 0);  // without threads, all work is done by whoever waits
  }
}

void a_paused_update_makes_no_progress() {
  Parameters all(400);
  ldft::UpdateJob job;
  all.add_to(job);
  job.start(2, 5);
  job.pause();
  const auto before = job.progress();
  std::this_thread::sleep_for(std::chrono::milliseconds(30));
  const auto after = job.progress();
  CHECK(!job.done() && before.bytes == after.bytes && before.seconds == after.seconds);
  job.resume();
  job.pause();
  job.wait(399);  // ends the pause
  CHECK(all.updated(399));
  job.finish();
  CHECK(job.progress().seconds > before.seconds);
}

void a_cancelled_or_dropped_update_leaves_no_thread() {
  for (int round = 0; round < 20; ++round) {
    Parameters all(100);
    ldft::UpdateJob job;
    all.add_to(job);
    job.start(3, 0);
    if (round % 2 == 0) job.cancel();
  }
}

}  // namespace

void test_updates() {
  updates_are_those_of_the_rules();
  a_wait_ends_when_the_parameter_is_updated();
  a_paused_update_makes_no_progress();
  a_cancelled_or_dropped_update_leaves_no_thread();
}
