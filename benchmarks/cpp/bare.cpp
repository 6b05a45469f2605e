// The bare loop: continuous batching on one replica and nothing else. The unit every figure is divided by.
//
// A fixed number of slots, first come first served. At each boundary every waiting request that finds a slot joins
// with its whole prompt; prompts and decodes share an iteration. A sequence is stored once, as the iteration at
// which it ends with its slot in the low bits; the next completion is the smallest of those. Between events the
// iterations are one jump with a closed form. No KV blocks, no token budget, no preemption, times in float64.
// It equals twin.cpp where blocks and budget never bind.

#include <cmath>

#include "workload.hpp"

static void simulate(const Workload& w, size_t base, Answers& answers, Counters& counters) {
    constexpr int64_t EMPTY = INT64_MAX;
    const Header& h = w.h;
    const int64_t* arrival = &w.arrival[base];
    const int32_t *prompt = &w.prompt[base], *output = &w.output[base];
    const int requests = h.requests, slots = h.slots;
    int bits = 1;
    while ((1 << bits) < slots) ++bits;
    const int64_t mask = (int64_t(1) << bits) - 1;

    std::vector<int64_t> keys(slots, EMPTY), offsets(slots);
    std::vector<int32_t> who(slots), free_slots(slots);
    for (int i = 0; i < slots; ++i) free_slots[i] = slots - 1 - i;
    int num_free = slots, next = 0, done = 0;
    int64_t clock = 0, offset_sum = 0, iterations = 0;  // a sequence holds offset + clock tokens
    double now = 0;

    auto arrives_s = [&](int i) { return arrival[i] * (1 / TICKS_PER_S); };
    while (done < requests) {
        int running = slots - num_free;
        if (running == 0 && arrives_s(next) > now) now = arrives_s(next);
        // Admit whoever has arrived and finds a slot.
        const int decoding = running;
        const int64_t context = offset_sum + decoding * (clock + 1);
        const int first_new = next;
        double tokens = 0, pairs = 0;
        while (next < requests && num_free > 0 && arrives_s(next) <= now) {
            const int slot = free_slots[--num_free];
            const double p = prompt[next];
            keys[slot] = (clock + output[next]) << bits | slot;
            offsets[slot] = prompt[next] - (clock + 1);
            offset_sum += offsets[slot];
            who[slot] = next;
            tokens += p;
            pairs += p * p;
            ++next;
        }
        running = slots - num_free;
        // This iteration, and the decode iterations that follow it undisturbed.
        const float* k = h.coefficients[next == first_new ? DECODE : decoding == 0 ? PREFILL : MIXED];
        const double first_end = now + (k[0] + k[1] * tokens + k[2] * double(context) + k[3] * double(running) + k[4] * pairs);
        for (int i = first_new; i < next; ++i) answers.first[base + i] = std::llrint(first_end * TICKS_PER_S);
        ++clock;
        int64_t smallest = EMPTY;
        for (int i = 0; i < slots; ++i) smallest = std::min(smallest, keys[i]);
        int64_t extra = (smallest >> bits) - clock;
        const float* d = h.coefficients[DECODE];
        const double growth = d[2] * double(running);
        const double pace = d[0] + d[2] * double(offset_sum + running * (clock + 1)) + d[3] * double(running);
        auto span = [&](int64_t j) { return j * pace + growth * (0.5 * double(j) * double(j - 1)); };
        double end = first_end + span(extra);
        if (num_free > 0 && next < requests && arrives_s(next) < end) {
            // The next arrival can join: stop at the first boundary at or after it.
            const double wait = arrives_s(next) - first_end;
            int64_t j = 0;
            if (wait > 0) {
                const double linear = pace - 0.5 * growth;
                j = int64_t(std::ceil(2 * wait / (linear + std::sqrt(linear * linear + 2 * growth * wait))));
                while (j > 0 && span(j - 1) >= wait) --j;
                while (span(j) < wait) ++j;
            }
            extra = std::min(extra, j);
            end = first_end + span(extra);
        }
        clock += extra;
        now = end;
        iterations += 1 + extra;
        ++counters.steps;
        // Retire.
        while ((smallest >> bits) == clock) {
            const int slot = int(smallest & mask);
            keys[slot] = EMPTY;
            offset_sum -= offsets[slot];
            free_slots[num_free++] = slot;
            answers.finish[base + who[slot]] = std::llrint(now * TICKS_PER_S);
            ++done;
            smallest = EMPTY;
            for (int i = 0; i < slots; ++i) smallest = std::min(smallest, keys[i]);
        }
    }
    counters.iterations += iterations;
}

int main(int argc, char** argv) { return benchmark(argc, argv, simulate); }
