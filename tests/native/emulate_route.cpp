// SPDX-License-Identifier: Apache-2.0
// The CUDA kernels on the host: the source of plugins/cuda, its launches run by emulation/fibers.cpp, against
// xshare_route_cpu. Every output must have the same bits.
//
//     emulate_route [cases] [seed]      random and adversarial calls
//     emulate_route reciprocal          the device's 1 / x for every x that it is asked for
//     emulate_route race | divergence   a faulty kernel, to show that the emulation notices
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <limits>
#include <random>
#include <vector>

#include "cuda/kernel.cuh"
#include "cuda/plan.h"

using namespace xshare;

namespace {

std::mt19937_64 generator;

uint32_t bits() { return static_cast<uint32_t>(generator()); }
bool one_in(uint32_t n) { return bits() % n == 0; }
int between(int low, int high) {
    return low + static_cast<int>(bits() % static_cast<uint32_t>(high - low + 1));
}
template <typename Type>
Type one_of(std::initializer_list<Type> values) {
    return values.begin()[bits() % values.size()];
}
float normal() { return std::normal_distribution<float>()(generator); }

// ---- The launches -----------------------------------------------------------------------------------------

struct Job {
    int kernel;
    RouteArgs args;
};

// The step kernels have variants.
template <int kKernel, int V>
void run_step(const RouteArgs& args) {
    run_kernel<kKernel, V>(args.known_to_be(args.variant()));
}

template <int V>
void run_thread(const void* argument) {
    const Job& job = *static_cast<const Job*>(argument);
    switch (job.kernel) {
        case XSHARE_KERNEL_BLOCK:
            return run_step<XSHARE_KERNEL_BLOCK, V>(job.args);
        case XSHARE_KERNEL_TEAM:
            return run_step<XSHARE_KERNEL_TEAM, V>(job.args);
        case XSHARE_KERNEL_GATHER_ROWS:
            return run_kernel<XSHARE_KERNEL_GATHER_ROWS, V>(job.args);
        case XSHARE_KERNEL_PLACE_REQUESTS:
            return run_kernel<XSHARE_KERNEL_PLACE_REQUESTS, V>(job.args);
        case XSHARE_KERNEL_ORDER_ROWS:
            return run_kernel<XSHARE_KERNEL_ORDER_ROWS, V>(job.args);
        case XSHARE_KERNEL_SUM_REQUESTS:
            return run_kernel<XSHARE_KERNEL_SUM_REQUESTS, V>(job.args);
        case XSHARE_KERNEL_PROPOSE:
            return run_kernel<XSHARE_KERNEL_PROPOSE, V>(job.args);
        case XSHARE_KERNEL_REFINE_ROWS:
            return run_kernel<XSHARE_KERNEL_REFINE_ROWS, V>(job.args);
        case XSHARE_KERNEL_TALLY_ROWS:
            return run_kernel<XSHARE_KERNEL_TALLY_ROWS, V>(job.args);
    }
}

void run_launch(const xshare_launch& launch, const RouteArgs& args) {
    const Job job = {launch.kernel, args};
    const emulation::Shape shape = {launch.num_blocks, launch.num_threads, launch.cluster_size};
    switch (experts_per_lane(args.p.num_experts)) {
        case 1:
            return emulation::launch(shape, run_thread<1>, &job);
        case 2:
            return emulation::launch(shape, run_thread<2>, &job);
        case 4:
            return emulation::launch(shape, run_thread<4>, &job);
        case 8:
            return emulation::launch(shape, run_thread<8>, &job);
        case 12:
            return emulation::launch(shape, run_thread<12>, &job);
        default:
            return emulation::launch(shape, run_thread<16>, &job);
    }
}

// Small blocks, so that a warp takes several rows and a call several blocks.
Machine random_machine() {
    Machine machine = {};
    machine.max_team_size = one_of({1, 1, 4, 8, 16});
    machine.max_step_threads = one_of({32, 64, 64, 96, 128});
    machine.row_threads = one_of({32, 64, 96});
    machine.max_row_blocks = between(1, 3);
    machine.block_rows = between(1, 12);
    machine.team_rows = between(1, 12);
    machine.max_block_rows = one_of({0, 0, 4, 256});
    return machine;
}

void route_emulated(RouteArgs args, const Machine& machine) {
    const size_t size = Workspace(args).size();
    std::vector<unsigned char> workspace(size + kWorkspaceAlignment, 0xA5);
    const uintptr_t start = reinterpret_cast<uintptr_t>(workspace.data()) + kWorkspaceAlignment - 1;
    args.workspace = reinterpret_cast<unsigned char*>(start / kWorkspaceAlignment * kWorkspaceAlignment);
    memset(args.workspace, 0, Workspace(args).cleared_size());
    const xshare_launch_plan plan = make_plan(args, machine);
    for (int i = 0; i < plan.num_launches; ++i) run_launch(plan.launches[i], args);
}

// ---- Random calls -----------------------------------------------------------------------------------------

// Now and then a hair above what some of equal utilities add up to.
double random_coverage(const xshare_route_params& p) {
    if (one_in(2)) return static_cast<double>(bits() % 1000 + 1) / 1000.0;
    const int whole = one_in(2) ? p.num_experts : std::max(p.num_tokens * p.top_k, 1);
    return std::min(1.0, static_cast<double>(between(1, whole)) / whole + 1e-12);
}

xshare_route_params random_params() {
    xshare_route_params p = {};
    p.struct_size = sizeof p;
    p.scoring = between(0, kNumScorings - 1);
    const ScoringRule rule = rule_of(p.scoring);
    p.num_groups = rule.group_best_of == 0 || one_in(2) ? 1 : one_of({2, 3, 4, 8, 8});
    const int most = one_in(4) ? kMaxExperts : 96;
    p.num_experts = p.num_groups * between(p.num_groups > 1 ? rule.group_best_of : 1, most / p.num_groups);
    if (one_in(3) && p.num_groups == 1) p.num_experts = one_of({32, 64, 128, 128, 256, 384, 512});
    if (one_in(3) && p.num_groups == 8) p.num_experts = one_of({64, 128, 160, 256});
    if (rule.group_best_of == 1 && one_in(20)) p.num_groups = p.num_experts;
    p.top_k_groups = between(1, p.num_groups);
    p.top_k = between(
        1, std::min({kMaxTopK, one_in(2) ? 4 : kMaxTopK, p.top_k_groups * (p.num_experts / p.num_groups)}));
    p.num_tokens = one_in(12) ? between(0, 90) : between(1, 12);
    p.routed_scaling_factor = one_of({1.0f, 1.0f, 2.5f, -0.5f});
    p.logits_dtype = between(0, 2);
    p.budget = one_in(5) ? std::max(p.num_experts, p.top_k)
                         : between(p.top_k, std::max(p.top_k, p.num_experts / (one_in(2) ? 4 : 1)));
    p.warmup = one_in(2) ? std::min(1, p.top_k) : between(p.num_groups > 1 ? 1 : 0, p.top_k);
    p.request_budget = one_in(3) ? between(1, one_in(2) ? 8 : p.num_experts + 1) : 0;
    p.gpu_budget = one_in(3) ? between(1, one_in(2) ? 4 : p.num_experts) : 0;
    p.coverage = one_in(2) ? random_coverage(p) : 0.0;
    p.max_rows = one_in(5) ? between(0, 12) : -1;
    p.utility = rule.is_bounded() ? between(0, 1) : XSHARE_SQUARED_WEIGHT;
    p.mask_value = one_in(3) ? one_of({-1.0f, -65504.0f, -32768.0f}) : 0.0f;
    if (p.logits_dtype == XSHARE_FLOAT32 && one_in(6)) p.mask_value = -std::numeric_limits<float>::max();
    if (p.logits_dtype == XSHARE_BFLOAT16 && p.mask_value == -65504.0f) p.mask_value = -INFINITY;
    return p;
}

uint16_t to_bf16(float x) {
    uint32_t b;
    memcpy(&b, &x, 4);
    return static_cast<uint16_t>(b >> 16);
}

enum class Kind { kNormal, kTies, kZeros, kHuge, kWide, kClose, kLow, kAnyBits, kAgreeing, kNumKinds };

float random_logit(Kind kind, int expert) {
    switch (kind) {
        case Kind::kTies:
            return rintf(normal() * 2.0f);
        case Kind::kZeros:
            return one_in(2) ? 0.0f : -0.0f;
        case Kind::kHuge:
            return normal() * 1e37f;
        case Kind::kWide:
            return normal() * 60.0f;
        case Kind::kClose:
            return 1.0f + rintf(normal() * 4.0f) * 0x1p-23f;
        case Kind::kLow:
            return normal() - 40.0f;
        case Kind::kAgreeing:
            return normal() + static_cast<float>((expert * 37) % 11);
        default:
            return normal();
    }
}

// One call's tensors on the heap, each exactly as long as it must be, for sanitizers.
struct Call {
    xshare_route_params p;
    std::vector<unsigned char> logits;
    std::vector<float> bias;
    std::vector<int32_t> request_ids, expert_gpu;
    std::vector<uint8_t> exempt;
    std::vector<xshare_dial> dial;

    explicit Call(const xshare_route_params& params) : p(params) {
        const size_t rows = static_cast<size_t>(p.num_tokens), experts = static_cast<size_t>(p.num_experts);
        fill_logits(rows, experts);
        if (rule_of(p.scoring).has_bias && !one_in(3)) {
            const float scale = one_of({0.1f, 0.1f, 1.0f, 1e37f, 0.0f});
            bias.resize(experts);
            for (float& b : bias) b = scale * normal();
        }
        if (p.request_budget > 0 || one_in(2)) {
            const int most = one_of({0, 1, 3, 40});
            request_ids.resize(rows);
            for (int32_t& id : request_ids)
                id = one_in(6) ? -1 : one_in(10) ? INT32_MAX : between(0, most) * 1000003;
        }
        if (one_in(3)) {
            exempt.resize(rows);
            for (uint8_t& e : exempt) e = one_in(4) ? static_cast<uint8_t>(between(1, 255)) : 0;
        }
        if (one_in(3)) {
            const double coverage = one_of({0.0, 0.3, 0.9, 0.97, 1.0, 2.0, -1.0, static_cast<double>(NAN)});
            dial.push_back({coverage, between(-1, p.num_experts + 1), between(0, 2)});
        }
        if (p.gpu_budget > 0 || one_in(2)) {
            const int gpus = std::min(one_of({1, 2, 8, 512}), p.num_experts);
            expert_gpu.resize(experts);
            for (int32_t& g : expert_gpu) g = between(0, gpus - 1);
        }
    }

    void fill_logits(size_t rows, size_t experts) {
        const Kind kind =
            one_in(2) ? Kind::kNormal : static_cast<Kind>(between(0, static_cast<int>(Kind::kNumKinds) - 1));
        const size_t size = p.logits_dtype == XSHARE_FLOAT32 ? 4 : 2;
        logits.resize(rows * experts * size);
        for (size_t i = 0; i < rows * experts; ++i) {
            const float z = random_logit(kind, static_cast<int>(i % experts));
            const uint16_t half =
                p.logits_dtype == XSHARE_FLOAT16 ? static_cast<uint16_t>(bits() & 0xbbff) : to_bf16(z);
            const uint32_t any =
                bits() & (one_in(64) ? ~0u : 0xbfffbfffu);  // now and then an infinity or a NaN
            const void* from = kind == Kind::kAnyBits ? static_cast<const void*>(&any)
                               : size == 4            ? static_cast<const void*>(&z)
                                                      : &half;
            memcpy(&logits[i * size], from, size);
        }
        if (one_in(3)) ban_experts(rows, experts, size);
        if (rows > 0 && one_in(5)) memset(&logits[(bits() % rows) * experts * size], 0xff, size);  // a NaN
        if (rows > 0 && one_in(9)) write_infinity((bits() % rows) * experts, size, 0);
    }

    void write_infinity(size_t at, size_t size, uint32_t sign) {
        const uint32_t half = p.logits_dtype == XSHARE_FLOAT16 ? 0x7c00u : 0x7f80u;
        const uint32_t infinity = size == 4 ? sign << 31 | 0x7f800000u : sign << 15 | half;
        memcpy(&logits[at * size], &infinity, size);
    }

    // A few experts of each row, all but about k, the same ones for all rows, or groups, as a whole or but
    // for one expert.
    void ban_experts(size_t rows, size_t experts, size_t size) {
        const int form = p.num_groups > 1 && one_in(2) ? 4 : between(0, 3);
        const uint32_t spared = static_cast<uint32_t>(between(1, 2 * p.top_k));
        const size_t group_size = experts / static_cast<size_t>(p.num_groups);
        const uint64_t seed = generator();
        for (size_t row = 0; row < rows; ++row) {
            if (form != 2 && one_in(3)) continue;
            std::mt19937_64 of_all(seed);
            for (size_t e = 0; e < experts; ++e) {
                const bool is_banned = form == 0   ? one_in(4)
                                       : form == 1 ? bits() % static_cast<uint32_t>(experts) >= spared
                                       : form == 2 ? of_all() % 3 == 0
                                       : (seed >> (e / group_size % 64) & 1) == 0 ? false
                                       : form == 3                                ? !one_in(9)
                                                                                  : e % group_size != 0;
                if (is_banned) write_infinity(row * experts + e, size, 1);
            }
        }
    }
};

// What most decode steps are, which have kernels of their own.
xshare_route_params plain(xshare_route_params p) {
    p.utility = XSHARE_SQUARED_WEIGHT;
    p.request_budget = p.gpu_budget = 0;
    p.max_rows = -1;
    return p;
}

// Contents that only the device functions accept, and what they stand for.
void spoil(Call& call, Call& meant) {
    for (float& b : call.bias)
        if (one_in(40)) {
            meant.bias[static_cast<size_t>(&b - call.bias.data())] = 0.0f;
            b = one_of({INFINITY, -INFINITY, NAN});
        }
    for (int32_t& id : call.request_ids)
        if (id == -1 && one_in(2)) id = one_of({-2, INT32_MIN});
    for (int32_t& g : call.expert_gpu) {
        if (g == 0 && one_in(4)) g = one_of({-1, INT32_MIN});
        if (g == call.p.num_experts - 1 && one_in(4)) g = one_of({call.p.num_experts, INT32_MAX});
    }
}

// ---- Outputs and comparison -------------------------------------------------------------------------------

struct Outputs {
    std::vector<int32_t> ids;
    std::vector<float> weights;
    std::vector<unsigned char> masked;
    std::vector<uint8_t> active;
    std::vector<float> bias;
    std::vector<int64_t> stats;

    // Poisoned, and of exact size: every element must be written.
    Outputs(const Call& call, int poison)
        : ids(static_cast<size_t>(call.p.num_tokens * call.p.top_k)),
          weights(ids.size()),
          masked(call.logits.size()),
          active(static_cast<size_t>(call.p.num_experts)),
          bias(active.size()),
          stats(XSHARE_NUM_STATS) {
        if (!ids.empty()) memset(ids.data(), poison, ids.size() * 4);
        if (!ids.empty()) memset(weights.data(), poison, ids.size() * 4);
        if (!masked.empty()) memset(masked.data(), poison, masked.size());
        memset(active.data(), poison, active.size());
        memset(bias.data(), poison, bias.size() * 4);
        memset(stats.data(), poison, stats.size() * 8);
    }
};

struct Wanted {
    bool ids = true, weights = true, masked = true, active = true, stats = true, bias = false,
         in_place = false;
};

RouteArgs arguments(Call& call, Outputs& out, const Wanted& wanted) {
    RouteArgs args = {};
    args.p = call.p;
    xshare_route_tensors& t = args.t;
    t.struct_size = sizeof t;
    t.router_logits = call.logits.data();
    if (!call.bias.empty()) t.correction_bias = call.bias.data();
    if (!call.request_ids.empty()) t.request_ids = call.request_ids.data();
    if (!call.exempt.empty()) t.exempt = call.exempt.data();
    if (!call.expert_gpu.empty()) t.expert_gpu = call.expert_gpu.data();
    if (wanted.ids) t.expert_ids = out.ids.data();
    if (wanted.weights) t.expert_weights = out.weights.data();
    if (wanted.masked) t.masked_logits = wanted.in_place ? call.logits.data() : out.masked.data();
    if (wanted.active) t.active_experts = out.active.data();
    if (wanted.bias) t.step_bias = out.bias.data();
    if (wanted.stats) t.stats = out.stats.data();
    if (!call.dial.empty()) t.dial = call.dial.data();
    return args;
}

template <typename Type>
bool same(const char* name, const std::vector<Type>& got, const std::vector<Type>& expected) {
    if (got.empty() || memcmp(got.data(), expected.data(), got.size() * sizeof(Type)) == 0) return true;
    printf("%s differs:\n", name);
    for (size_t i = 0; i < got.size(); ++i)
        if (memcmp(&got[i], &expected[i], sizeof(Type)) != 0)
            printf("  [%zu] %.9g, not %.9g\n", i, static_cast<double>(got[i]),
                   static_cast<double>(expected[i]));
    return false;
}

void print_call(const Call& call, const Machine& m) {
    const xshare_route_params& p = call.p;
    printf(
        "T=%d E=%d k=%d scoring=%d dtype=%d groups=%d/%d m=%d k0=%d m_r=%d m_g=%d c=%g max_rows=%d "
        "utility=%d "
        "mask=%g ids=%d exempt=%d gpus=%d | team=%d "
        "step=%d rows=%d x %d block_rows=%d team_rows=%d max_block_rows=%d dial=%d\n",
        p.num_tokens, p.num_experts, p.top_k, p.scoring, p.logits_dtype, p.top_k_groups, p.num_groups,
        p.budget, p.warmup, p.request_budget, p.gpu_budget, p.coverage, p.max_rows, p.utility,
        static_cast<double>(p.mask_value), !call.request_ids.empty(), !call.exempt.empty(),
        !call.expert_gpu.empty(), m.max_team_size, m.max_step_threads, m.row_threads, m.max_row_blocks,
        m.block_rows, m.team_rows, m.max_block_rows, call.dial.empty() ? -1 : call.dial[0].mode);
}

// What a coverage asks of whole sums.
bool share_is_least() {
    const double coverage = static_cast<double>(between(1, 1000)) / 1000.0;
    const uint64_t total = generator() >> between(15, 60);
    const uint64_t share = share_of(coverage, total);
    const double enough = coverage * as_double(total);
    if (as_double(share) >= enough && (share == 0 || as_double(share - 1) < enough)) return true;
    printf("%g of %llu is not %llu\n", coverage, static_cast<unsigned long long>(total),
           static_cast<unsigned long long>(share));
    return false;
}

bool run_case() {
    if (!share_is_least()) return false;
    const bool is_plain = one_in(4);
    Call call(is_plain ? plain(random_params()) : random_params());
    if (is_plain) call.dial.clear(), call.expert_gpu.clear();
    Call meant = call;
    if (one_in(4)) spoil(call, meant);
    Wanted wanted;
    if (one_in(3)) wanted = {!one_in(3), !one_in(3), !one_in(3), !one_in(3), !one_in(2), false, false};
    const bool may_have_bias =
        call.p.scoring == XSHARE_SIGMOID_BIAS && call.p.num_groups == 1 && call.p.warmup > 0;
    wanted.bias = may_have_bias && one_in(2);
    if (is_plain) wanted.masked = wanted.bias = wanted.stats = false;
    const Machine machine = random_machine();
    Outputs expected(call, 0x5a), got(call, 0x5a);
    for (int32_t& g : meant.expert_gpu) g = std::min(std::max(g, 0), call.p.num_experts - 1);
    const RouteArgs host = arguments(meant, expected, wanted);
    if (xshare_route_cpu(&host.p, &host.t, nullptr, 0) != XSHARE_OK) {
        printf("refused: %s\n", xshare_last_error());
        print_call(call, machine);
        return false;
    }
    wanted.in_place = wanted.masked && one_in(3);
    route_emulated(arguments(call, got, wanted), machine);
    if (wanted.in_place) got.masked = call.logits;
    if (same("expert_ids", got.ids, expected.ids) && same("expert_weights", got.weights, expected.weights) &&
        same("masked_logits", got.masked, expected.masked) &&
        same("active_experts", got.active, expected.active) && same("step_bias", got.bias, expected.bias) &&
        same("stats", got.stats, expected.stats))
        return true;
    print_call(call, machine);
    return false;
}

// ---- Reciprocals ------------------------------------------------------------------------------------------

// Whatever the hardware's guess is: PTX promises one within 2^-23 of 1 / x for 1 <= x <= 2, 2 units in the
// last place.
int check_reciprocals() {
    int wrong = 0;
    for (int32_t x_bits = float_bits(1.0f); x_bits <= float_bits(2.0f); ++x_bits) {
        const float x = bits_float(x_bits), right = 1.0f / x;
        for (int off = -4; off <= 4; ++off)
            wrong += refine_reciprocal(x, bits_float(float_bits(right) + off)) != right;
    }
    printf("%d reciprocals are wrong\n", wrong);
    return wrong != 0;
}

// ---- Faulty kernels ---------------------------------------------------------------------------------------

void race(const void*) {
    struct Shared {
        int values[64];
    };
    XSHARE_SHARED(Shared, shared);
    shared.values[device::thread()] = 1;
    device::sync_warp();  // orders the warp, but the value read is the other warp's
    shared.values[device::thread()] += shared.values[(device::thread() + 32) % 64];
}

void divergence(const void*) {
    if (device::thread() < 40) device::sync_warp();
}

}  // namespace

int main(int argc, char** argv) {
    const char* first = argc > 1 ? argv[1] : "2000";
    if (strcmp(first, "reciprocal") == 0) return check_reciprocals();
    if (strcmp(first, "race") == 0) return emulation::launch({1, 64, 1}, race, nullptr), 0;
    if (strcmp(first, "divergence") == 0) return emulation::launch({1, 64, 1}, divergence, nullptr), 0;
    const long cases = atol(first);
    const uint64_t seed = argc > 2 ? static_cast<uint64_t>(atol(argv[2])) : 1;
    generator.seed(seed);
    emulation::set_seed(seed);
    for (long i = 0; i < cases; ++i) {
        if (run_case()) continue;
        printf("case %ld of seed %llu differs\n", i, static_cast<unsigned long long>(seed));
        return 1;
    }
    printf("%ld calls agree with xshare_route_cpu\n", cases);
    return 0;
}
