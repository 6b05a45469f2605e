// What both programs share: the workload file, repeats and their times, answers and their checksum.
//
// File (little endian): the header below, then for all scenarios in turn arrival (int64 ticks of 2^-30 s, sorted),
// prompt and output (int32 tokens). Answers: first token and finish (int64 ticks), preemptions (int32).

#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

constexpr double TICKS_PER_S = 1073741824.0;
constexpr int PREFILL = 0, DECODE = 1, MIXED = 2;

struct Header {
    char magic[8];
    int32_t scenarios, requests, slots, num_blocks, block_size, budget, max_jump, reserved;
    float coefficients[3][5];  // rows (a, b, c, d, e) for prefill-only, decode-only and mixed iterations
};

struct Workload {
    Header h;
    std::vector<int64_t> arrival;
    std::vector<int32_t> prompt, output;
};

struct Answers {
    std::vector<int64_t> first, finish;
    std::vector<int32_t> preemptions;
};

struct Counters {
    int64_t iterations = 0, steps = 0;
};

[[noreturn]] inline void fail(const char* message) {
    std::fprintf(stderr, "%s\n", message);
    std::exit(1);
}

template <class T>
void read_all(std::FILE* file, T* to, size_t count) {
    if (std::fread(to, sizeof(T), count, file) != count) fail("workload file too short");
}

inline Workload read_workload(const char* path) {
    std::FILE* file = std::fopen(path, "rb");
    if (!file) fail("cannot open the workload file");
    Workload w;
    read_all(file, &w.h, 1);
    if (std::memcmp(w.h.magic, "JXSBNCH1", 8) != 0) fail("not a workload file");
    const size_t total = size_t(w.h.scenarios) * w.h.requests;
    w.arrival.resize(total);
    w.prompt.resize(total);
    w.output.resize(total);
    read_all(file, w.arrival.data(), total);
    read_all(file, w.prompt.data(), total);
    read_all(file, w.output.data(), total);
    std::fclose(file);
    return w;
}

inline void write_answers(const char* path, const Answers& a) {
    std::FILE* file = std::fopen(path, "wb");
    if (!file) fail("cannot write the answers");
    std::fwrite(a.first.data(), 8, a.first.size(), file);
    std::fwrite(a.finish.data(), 8, a.finish.size(), file);
    std::fwrite(a.preemptions.data(), 4, a.preemptions.size(), file);
    std::fclose(file);
}

// Order matters through the index: a sum modulo 2^64 that NumPy computes as well.
inline uint64_t checksum(const Answers& a) {
    uint64_t sum = 0;
    for (size_t i = 0; i < a.finish.size(); ++i) {
        const uint64_t one = uint64_t(a.finish[i]) * 0x9E3779B97F4A7C15ull + uint64_t(a.first[i]) * 0xC2B2AE3D27D4EB4Full +
                             uint64_t(a.preemptions[i]);
        sum += one * (2 * uint64_t(i) + 1);
    }
    return sum;
}

// main() of both: PROGRAM WORKLOAD REPEATS [ANSWERS]; prints one line of JSON.
template <class Simulate>
int benchmark(int argc, char** argv, Simulate simulate) {
    if (argc < 3) fail("usage: PROGRAM WORKLOAD REPEATS [ANSWERS]");
    const Workload w = read_workload(argv[1]);
    const size_t total = w.arrival.size();
    Answers a{std::vector<int64_t>(total), std::vector<int64_t>(total), std::vector<int32_t>(total)};
    Counters c;
    std::vector<double> seconds;
    for (int i = 0; i < std::max(1, std::atoi(argv[2])); ++i) {
        c = Counters();
        const auto start = std::chrono::steady_clock::now();
        for (int b = 0; b < w.h.scenarios; ++b) simulate(w, size_t(b) * w.h.requests, a, c);
        seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    std::sort(seconds.begin(), seconds.end());
    long long preemptions = 0;
    for (int32_t p : a.preemptions) preemptions += p;
    std::printf("{\"requests\": %zu, \"best_s\": %.9f, \"median_s\": %.9f, \"checksum\": \"%016llx\", "
                "\"preemptions\": %lld, \"iterations\": %lld, \"steps\": %lld}\n",
                total, seconds.front(), seconds[seconds.size() / 2], (unsigned long long)checksum(a), preemptions,
                (long long)c.iterations, (long long)c.steps);
    if (argc > 3) write_answers(argv[3], a);
    return 0;
}
