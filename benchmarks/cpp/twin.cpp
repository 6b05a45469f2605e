// A C++ simulator of one replica under the rules of preset vllm-v1, to check the engine's answers and to race it.
//
// First come first served; prompts cut at the token budget; decodes and chunks in one iteration; KV blocks exact;
// when blocks run short the last admitted goes back to the front of the queue and is computed anew, and nothing is
// admitted in that pass. Time is an integer count of 2^-30 s; durations are float32 in the engine's order of
// operations. Fast where a plain program can be: running sequences lie densely in order of admission (the last is
// the victim), the queue is a stack of the preempted on top of a range of arrivals, and iterations between events
// are one jump.

#include <cmath>

#include "workload.hpp"

// Round to the grid, half to even. From 2^-5 s up a float32 is no finer than the grid.
static inline int64_t to_ticks(float seconds) {
    return seconds < 0x1p-5f ? std::llrintf(seconds * 0x1p30f) : int64_t(double(seconds) * TICKS_PER_S);
}

struct Replica {
    // The running list, in order of admission: the iteration count at which each ends, context less the iteration
    // count, request.
    std::vector<int32_t> ends, offsets, who;
    std::vector<int32_t> preempted;  // the front of the queue, last in first out
    std::vector<int32_t> emitted;    // by request; only of those preempted
    int32_t by_residue[256];         // running sequences by offset modulo the block size
};

static void simulate(const Workload& w, size_t base, Answers& answers, Counters& counters) {
    static Replica r;
    const Header& h = w.h;
    const int64_t* arrival = &w.arrival[base];
    const int32_t *prompt = &w.prompt[base], *output = &w.output[base];
    int64_t *first = &answers.first[base], *finish = &answers.finish[base];
    int32_t* preemptions = &answers.preemptions[base];
    const int requests = h.requests, block_mask = h.block_size - 1;
    int block_bits = 0;
    while ((1 << block_bits) < h.block_size) ++block_bits;
    auto blocks_for = [&](int32_t tokens) { return (tokens + block_mask) >> block_bits; };

    r.ends.assign(h.slots, 0);
    r.offsets.assign(h.slots, 0);
    r.who.assign(h.slots, 0);
    r.emitted.assign(requests, 0);
    r.preempted.clear();
    std::memset(r.by_residue, 0, sizeof r.by_residue);
    std::memset(preemptions, 0, sizeof(int32_t) * requests);
    int32_t *ends = r.ends.data(), *offsets = r.offsets.data(), *who = r.who.data();

    int64_t now = 0;
    int arrived = 0, admitted = 0, done = 0;  // arrived and not yet admitted: the back of the queue
    int32_t clock = 0, used = 0, decoding = 0;
    int64_t offset_sum = 0;
    int forming = -1, forming_computed = 0, forming_known = 0;  // the one partly computed prompt

    while (done < requests) {
        int waiting = int(r.preempted.size()) + arrived - admitted;
        if (decoding == 0 && forming < 0 && waiting == 0) {
            now = arrival[arrived];
            while (arrived < requests && arrival[arrived] <= now) ++arrived, ++waiting;
        }

        // A scheduling pass. Decodes first; whoever was admitted last makes room.
        int budget = h.budget - decoding;
        bool has_preempted = false;
        int32_t crossing, chunk = 0;
        for (;;) {
            crossing = r.by_residue[-clock & block_mask];
            int32_t need = crossing;
            if (forming >= 0) {
                chunk = std::min(forming_known - forming_computed, budget);
                need += blocks_for(forming_computed + chunk) - blocks_for(forming_computed);
            }
            if (need <= h.num_blocks - used) break;
            int victim, has_emitted;
            if (forming >= 0) {
                victim = forming;
                has_emitted = forming_known - prompt[victim];
                used -= blocks_for(forming_computed);
                forming = -1;
            } else {
                --decoding;
                ++budget;
                victim = who[decoding];
                const int32_t offset = offsets[decoding];
                has_emitted = offset + clock + 1 - prompt[victim];
                used -= blocks_for(offset + clock);
                offset_sum -= offset;
                --r.by_residue[offset & block_mask];
            }
            r.emitted[victim] = has_emitted;
            r.preempted.push_back(victim);
            ++preemptions[victim];
            ++waiting;
            has_preempted = true;
        }
        used += crossing;
        const int decodes = decoding;
        const int64_t context = offset_sum + int64_t(decodes) * (clock + 1);

        // Then prompts: the forming one, then the queue. Those completed here decode from the next iteration on.
        int chunks = 0, chunk_tokens = 0, joining_first = 0;
        float pairs = 0;
        int new_first[1024];
        auto join = [&](int request, int known, int has_emitted) {
            const int32_t offset = known - (clock + 1);
            offsets[decoding] = offset;
            ends[decoding] = clock + 1 + output[request] - has_emitted - 1;
            who[decoding] = request;
            ++decoding;
            offset_sum += offset;
            ++r.by_residue[offset & block_mask];
            if (has_emitted == 0) new_first[joining_first++] = request;
        };
        if (forming >= 0) {
            used += blocks_for(forming_computed + chunk) - blocks_for(forming_computed);
            const float start = float(forming_computed), stop = float(forming_computed + chunk);
            pairs += (stop - start) * (stop + start);
            ++chunks;
            chunk_tokens += chunk;
            budget -= chunk;
            forming_computed += chunk;
            if (forming_computed == forming_known) {
                join(forming, forming_known, forming_known - prompt[forming]);
                forming = -1;
            }
        }
        bool is_held = false;  // the head of the queue cannot join before something leaves
        if (!has_preempted) {
            while (waiting > 0 && budget > 0 && forming < 0 && decoding < h.slots) {
                const bool is_back = !r.preempted.empty();
                const int request = is_back ? r.preempted.back() : admitted;
                const int has_emitted = is_back ? r.emitted[request] : 0;
                const int known = prompt[request] + has_emitted;
                const int part = std::min(known, budget);
                const int32_t blocks = blocks_for(part);
                if (blocks > h.num_blocks - used) {
                    is_held = true;
                    break;
                }
                if (is_back) r.preempted.pop_back();
                else ++admitted;
                --waiting;
                used += blocks;
                pairs += float(part) * float(part);
                ++chunks;
                chunk_tokens += part;
                budget -= part;
                if (part == known) {
                    join(request, known, has_emitted);
                } else {
                    forming = request;
                    forming_computed = part;
                    forming_known = known;
                }
            }
        }
        const int running = decoding + (forming >= 0);
        is_held |= running >= h.slots;
        if (decodes == 0 && chunks == 0) {
            if (!has_preempted) fail("a request can never be served");
            continue;  // everything was preempted: the pass begins again at once
        }

        // The iteration, and the decode iterations that follow it undisturbed.
        const float* k = h.coefficients[chunks == 0 ? DECODE : decodes == 0 ? PREFILL : MIXED];
        const float seconds = std::fmaf(k[4],pairs,std::fmaf(k[3],float(decodes+chunks),std::fmaf(k[2],float(context),std::fmaf(k[1],float(chunk_tokens),k[0]))));
        const int64_t first_end = now + to_ticks(seconds);
        for (int i = 0; i < joining_first; ++i) first[new_first[i]] = first_end;
        ++clock;
        int32_t extra = 0;
        int64_t end = first_end;
        if (decoding > 0 && forming < 0 && (waiting == 0 || is_held)) {
            int32_t next_end = INT32_MAX;
            for (int i = 0; i < decoding; ++i) next_end = std::min(next_end, ends[i]);
            extra = std::min(next_end - clock, h.max_jump - 1);
            const float* d = h.coefficients[DECODE];
            const float pace = std::fmaf(d[3],float(decoding),std::fmaf(d[2],float(offset_sum + int64_t(decoding) * (clock + 1)),d[0]));
            const float growth = d[2] * float(decoding);
            auto span = [&](int32_t count) {
                const float j = float(count);
                const float product = j * pace;
                const int64_t kept = to_ticks(product);
                // What the product lost, exactly: 12 bits of count times 24 of pace fit a double.
                const double lost = double(j) * double(pace) - double(kept) / TICKS_PER_S;
                return kept + std::llrint(lost * TICKS_PER_S) + to_ticks(growth * (j * (j - 1.0f) * 0.5f));
            };
            // Whole turns of the block size take a block of each sequence; the rest is counted out.
            const int32_t room = h.num_blocks - used, turns = room / decoding;
            int32_t fits = turns << block_bits;
            if (fits < extra) {
                int32_t left = room - turns * decoding;
                while (fits < extra && (left -= r.by_residue[-(clock + fits) & block_mask]) >= 0) ++fits;
                extra = std::min(extra, fits);
            }
            end = first_end + span(extra);
            if (extra > 0 && waiting == 0 && running < h.slots && arrived < requests && arrival[arrived] < end) {
                // The next arrival may join: stop at the first boundary at or after it.
                const int64_t wait = arrival[arrived] - first_end;
                int32_t j = 0;
                if (wait > 0) {
                    const float wait_s = float(double(wait) / TICKS_PER_S), linear = pace - 0.5f * growth;
                    j = int32_t(std::ceil(2 * wait_s / (linear + std::sqrt(linear * linear + 2 * growth * wait_s))));
                    while (j > 0 && span(j - 1) >= wait) --j;
                    while (span(j) < wait) ++j;
                }
                extra = std::min(extra, j);
                end = first_end + span(extra);
            }
            used += decoding * (extra >> block_bits);
            for (int32_t i = 0; i < (extra & block_mask); ++i) used += r.by_residue[-(clock + i) & block_mask];
        }
        while (arrived < requests && arrival[arrived] <= end) ++arrived;
        clock += extra;
        now = end;
        counters.iterations += 1 + extra;
        ++counters.steps;

        // Retire, keeping the order of admission.
        int kept = 0;
        for (int i = 0; i < decoding; ++i) {
            if (ends[i] == clock) {
                finish[who[i]] = now;
                used -= blocks_for(offsets[i] + clock);
                offset_sum -= offsets[i];
                --r.by_residue[offsets[i] & block_mask];
                ++done;
            } else {
                ends[kept] = ends[i];
                offsets[kept] = offsets[i];
                who[kept] = who[i];
                ++kept;
            }
        }
        decoding = kept;
        if (clock >= 1 << 20) {  // wind the iteration count back, by whole blocks so that residues stay
            const int32_t turns = clock & ~block_mask;
            for (int i = 0; i < decoding; ++i) ends[i] -= turns, offsets[i] += turns;
            offset_sum += int64_t(turns) * decoding;
            clock -= turns;
        }
    }
    if (used != 0) fail("blocks leaked");
}

int main(int argc, char** argv) { return benchmark(argc, argv, simulate); }
