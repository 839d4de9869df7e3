// The player: a list of operations over buffers, played for the rows of a step by a team of threads.
//
// Knows: operations as the caller lists them, buffers, and which thread does what part of an operation.
// Must not know: families of models, files, other ranks.
//
// Threads share an operation by rows, by panels of outputs, or by rows and heads, always in the same static parts; no sum
// is ever shared, so their number changes no bit.
#pragma once
#include <memory>
#include <vector>

#include "attention.h"
#include "operations.h"
#include "products.h"
#include "team.h"
#include "unpack.h"

enum BufferId : int32_t { HIDDEN, NORMED, QKV, MIXED, INNER, ACTIVE, CHANGE, LOGITS, BUFFERS };
enum Kind : int32_t { RMS_NORM, LAYER_NORM, PRODUCT, ROTATE, WRITE, ATTEND, ACTIVATE, ADD, SELECT };

// One operation. What a, b, c and x are depends on its kind:
//   norms     heads a to before b of c elements each, x eps; data the weight, more the bias
//   PRODUCT   data a WeightArgs
//   ROTATE    the first a heads; data cosines, more sines [positions][dim / 2]
//   WRITE     into the cache of layer a
//   ATTEND    over the cache of layer a, b positions back or all where 0, x the scale of scores
//   ACTIVATE  c elements by function a, gated where b
//   ADD       c elements
//   SELECT    the rows of buffers whose bits are in a
struct OperationArgs {
    int32_t kind, source, target, a, b, c;
    float x;
    const void *data, *more;
};

struct PlayerArgs {
    int32_t operations;
    const OperationArgs* operation;
    int32_t widths[BUFFERS];
    int32_t heads, kv_heads, dim, stored, positions, layers, threads;
    uint8_t* const* pages;  // of each layer
};

// A step: `rows` positions, of which `outputs` have an output. Null where a range of operations begins or ends without.
struct StepArgs {
    int32_t rows, outputs;
    const int32_t *positions, *slots, *output_rows;
    const int32_t* tables;  // [slots][table]
    int32_t table;
    const float* hidden_in;  // [rows][width]
    float* hidden_out;       // [rows or outputs][width]
    float* logits;           // [outputs][vocabulary]
};

class Player {
   public:
    explicit Player(const PlayerArgs& args);

    // Operations `first` to before `last` for a step; the first range of a step brings hidden_in.
    void play(const StepArgs& step, int first, int last);

    // The panels `first` to before `last` of a product's weight as columns [inputs][(last - first) * 16], float32 or
    // bfloat16: whoever multiplies with them takes and leaves rows in buffers between two ranges of operations.
    void unpack_columns(int operation, int first, int last, bool brain, void* columns);
    float* buffer(int32_t id, int64_t& stride);

   private:
    struct Operation {
        OperationArgs args;
        std::unique_ptr<Weight> weight;
    };
    struct Workspace {
        std::vector<float> values;
        size_t stride = 0;
    };

    void reserve(int rows);
    void work(int thread);
    void execute(const Operation& operation, int thread);
    void product(const Operation& operation, int thread);
    void attend_rows(const Operation& operation, int thread);
    void normalise(const Operation& operation, int row);
    void row(const Operation& operation, int row);
    void select(const Operation& operation);
    float* at(int32_t buffer, int row) { return buffers_[buffer].values.data() + (size_t)row * buffers_[buffer].stride; }
    const int32_t* table(int row) const { return step_->tables + (size_t)slots_[(size_t)row] * (size_t)step_->table; }
    int part(int count, int thread) const { return (int)((int64_t)count * thread / team_.count()); }

    PlayerArgs args_;
    std::vector<Operation> operations_;
    std::vector<Cache> caches_;
    Workspace buffers_[BUFFERS];
    std::vector<int8_t> levels_;
    std::vector<float> scales_;
    std::vector<int32_t> sums_;
    std::vector<std::vector<float>> scratch_;  // of each thread
    size_t padded_ = 0, groups_ = 0;           // the most that a row of whole numbers takes
    int capacity_ = 0, rows_ = 0, first_ = 0, last_ = 0;
    std::vector<int32_t> positions_, slots_;
    const StepArgs* step_ = nullptr;
    Team team_;
};
