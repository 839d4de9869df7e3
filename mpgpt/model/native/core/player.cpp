#include "player.h"

#include <algorithm>
#include <type_traits>

namespace {

bool by_rows(int32_t kind) {
    return kind == RMS_NORM || kind == LAYER_NORM || kind == ROTATE || kind == WRITE || kind == ACTIVATE || kind == ADD;
}

template <typename Pages> void dispatch(int32_t stored, Pages pages) {
    switch (stored) {
        case STORED_FLOAT32: pages(std::integral_constant<Stored, STORED_FLOAT32>()); break;
        case STORED_FLOAT16: pages(std::integral_constant<Stored, STORED_FLOAT16>()); break;
        default: pages(std::integral_constant<Stored, STORED_BFLOAT16>()); break;
    }
}

}  // namespace

Player::Player(const PlayerArgs& args) : args_(args), team_(args.threads) {
    size_t inputs = 0;
    for (int i = 0; i < args.operations; i++) {
        operations_.push_back({args.operation[i], nullptr});
        Operation& operation = operations_.back();
        if (operation.args.kind != PRODUCT) continue;
        operation.weight.reset(new Weight(*(const WeightArgs*)operation.args.data));
        const Weight& weight = *operation.weight;
        inputs = std::max(inputs, (size_t)weight.inputs);
        if (!is_whole(weight.format)) continue;
        padded_ = std::max(padded_, (size_t)weight.padded), groups_ = std::max(groups_, (size_t)weight.groups);
    }
    for (int i = 0; i < args.layers; i++)
        caches_.emplace_back(args.pages[i], args.kv_heads, args.dim, (Stored)args.stored);
    const size_t scores = (size_t)MOST_HEADS * (size_t)(args.positions + 2 * BLOCK);
    scratch_.assign((size_t)args.threads, std::vector<float>(std::max(inputs, scores)));
    for (int i = 0; i < BUFFERS; i++)  // rows a line more apart than whole sixteens, so that they use all of a cache
        buffers_[i].stride = ((size_t)args.widths[i] + WIDTH - 1) / WIDTH * WIDTH + WIDTH;
}

void Player::reserve(int rows) {
    if (rows <= capacity_) return;
    capacity_ = (rows + 15) / 16 * 16;
    const size_t count = (size_t)capacity_;
    for (int i = 0; i < BUFFERS; i++)
        if (i != LOGITS) buffers_[i].values.assign(count * buffers_[i].stride, 0.0f);
    levels_.assign(count * padded_, 0), scales_.assign(count * groups_, 0.0f), sums_.assign(count * groups_, 0);
    positions_.resize(count), slots_.resize(count);
}

void Player::play(const StepArgs& step, int first, int last) {
    ExactFloats exact;
    const size_t width = (size_t)args_.widths[HIDDEN], bytes = sizeof(float) * width;
    step_ = &step, first_ = first, last_ = last;
    if (step.hidden_in) {
        reserve(rows_ = step.rows);
        for (int t = 0; t < rows_; t++) {
            memcpy(at(HIDDEN, t), step.hidden_in + (size_t)t * width, bytes);
            positions_[(size_t)t] = step.positions[t], slots_[(size_t)t] = step.slots[t];
        }
    }
    team_.run([](void* player, int thread) { ((Player*)player)->work(thread); }, this);
    if (step.hidden_out)
        for (int t = 0; t < rows_; t++) memcpy(step.hidden_out + (size_t)t * width, at(HIDDEN, t), bytes);
}

void Player::unpack_columns(int operation, int first, int last, bool brain, void* columns) {
    ExactFloats exact;
    struct Job {
        Player& player;
        const Weight& weight;
        int first, count;
        bool brain;
        void* columns;
    } job = {*this, *operations_[(size_t)operation].weight, first, last - first, brain, columns};
    team_.run([](void* with, int thread) {
        const Job& j = *(const Job*)with;
        const size_t stride = (size_t)j.count * WIDTH;
        for (int i = j.player.part(j.count, thread); i < j.player.part(j.count, thread + 1); i++)
            if (j.brain) unpack(j.weight, j.first + i, (uint16_t*)j.columns + i * WIDTH, stride);
            else unpack(j.weight, j.first + i, (float*)j.columns + i * WIDTH, stride);
    }, &job);
}

float* Player::buffer(int32_t id, int64_t& stride) {
    stride = (int64_t)buffers_[id].stride;
    return at(id, 0);
}

void Player::work(int thread) {
    for (int i = first_; i < last_; i++) {
        const Operation& operation = operations_[(size_t)i];
        // Between operations by rows a thread has its own rows, and need not wait for the others'.
        if (i > first_ && !(by_rows(operation.args.kind) && by_rows(operations_[(size_t)i - 1].args.kind))) team_.meet();
        execute(operation, thread);
    }
}

void Player::execute(const Operation& operation, int thread) {
    switch (operation.args.kind) {
        case PRODUCT: return product(operation, thread);
        case ATTEND: return attend_rows(operation, thread);
        case SELECT:
            if (!thread) select(operation);
            return;
        default:
            for (int t = part(rows_, thread); t < part(rows_, thread + 1); t++) row(operation, t);
    }
}

void Player::product(const Operation& operation, int thread) {
    const Weight& weight = *operation.weight;
    const OperationArgs& args = operation.args;
    const bool whole = is_whole(weight.format), logits = args.target == LOGITS;
    const size_t padded = (size_t)weight.padded, groups = (size_t)weight.groups;
    if (whole) {
        float* scratch = scratch_[(size_t)thread].data();
        for (int t = part(rows_, thread); t < part(rows_, thread + 1); t++) {
            const size_t row = (size_t)t;
            quantise_row(weight, at(args.source, t), scratch, &levels_[row * padded], &scales_[row * groups], &sums_[row * groups]);
        }
        team_.meet();
    }
    if (!rows_) return;
    const Rows rows = {at(args.source, 0), buffers_[args.source].stride, levels_.data(), scales_.data(), sums_.data(), padded, groups};
    float* y = logits ? step_->logits : at(args.target, 0);
    const size_t stride = logits ? (size_t)weight.outputs : buffers_[args.target].stride;
    multiply(weight, rows, rows_, y, stride, part(weight.panels, thread), part(weight.panels, thread + 1));
}

void Player::attend_rows(const Operation& operation, int thread) {
    const OperationArgs& args = operation.args;
    const int shared = args_.heads / args_.kv_heads, count = rows_ * args_.kv_heads;
    for (int unit = part(count, thread); unit < part(count, thread + 1); unit++) {
        const int t = unit / args_.kv_heads, head = unit % args_.kv_heads, stop = positions_[(size_t)t] + 1;
        const Seen seen = {table(t), args.b && stop > args.b ? stop - args.b : 0, stop};
        const int first = head * shared * args_.dim;
        const float* q = at(args.source, t) + first;
        float* out = at(args.target, t) + first;
        dispatch(args_.stored, [&](auto stored) {
            constexpr Stored S = decltype(stored)::value;
            attend_all<S>(caches_[(size_t)args.a], head, seen, args.x, q, shared, scratch_[(size_t)thread].data(), out);
        });
    }
}

void Player::normalise(const Operation& operation, int t) {
    const OperationArgs& args = operation.args;
    for (int head = args.a; head < args.b; head++) {
        const float* x = at(args.source, t) + head * args.c;
        float* y = at(args.target, t) + head * args.c;
        if (args.kind == RMS_NORM) rms_norm(x, (const float*)args.data, args.c, args.x, y);
        else layer_norm(x, (const float*)args.data, (const float*)args.more, args.c, args.x, y);
    }
}

// An operation by rows, for one of them.
void Player::row(const Operation& operation, int t) {
    const OperationArgs& args = operation.args;
    const float* source = at(args.source, t);
    float* target = at(args.target, t);
    const int position = positions_[(size_t)t];
    switch (args.kind) {
        case ROTATE: {
            const size_t half = (size_t)args_.dim / 2, from = (size_t)position * half;
            const float *cosine = (const float*)args.data + from, *sine = (const float*)args.more + from;
            for (int head = 0; head < args.a; head++) rotate(target + head * args_.dim, cosine, sine, args_.dim);
            break;
        }
        case WRITE:
            dispatch(args_.stored, [&](auto stored) {
                constexpr Stored S = decltype(stored)::value;
                write_position<S>(caches_[(size_t)args.a], table(t), position, source + args_.heads * args_.dim);
            });
            break;
        case ACTIVATE: activate((Activation)args.a, source, args.b ? source + args.c : nullptr, args.c, target); break;
        case ADD:
            for (int i = 0; i < args.c; i++) target[i] += source[i];
            break;
        default: normalise(operation, t);
    }
}

void Player::select(const Operation& operation) {
    for (int to = 0; to < step_->outputs; to++) {
        const int from = step_->output_rows[to];
        for (int i = 0; i < BUFFERS; i++)
            if (operation.args.a >> i & 1)
                memmove(at(i, to), at(i, from), sizeof(float) * (size_t)args_.widths[i]);
        positions_[(size_t)to] = positions_[(size_t)from], slots_[(size_t)to] = slots_[(size_t)from];
    }
    rows_ = step_->outputs;
}
