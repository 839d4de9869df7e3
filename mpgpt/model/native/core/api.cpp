// What Python calls: C functions over plain structures (library.py has the same structures).
#include "player.h"

#include <new>

#if !defined(MPGPT_SOURCES)
#define MPGPT_SOURCES ""
#endif
#if defined(_WIN32)
#define API extern "C"
#else
#define API extern "C" __attribute__((visibility("default")))
#endif

// The digest of the sources that this was built from, and the compiler.
API const char* mpgpt_sources() { return MPGPT_SOURCES; }
#if defined(__clang__)
API const char* mpgpt_compiler() { return "clang " __clang_version__; }
#else
API const char* mpgpt_compiler() { return "gcc " __VERSION__; }
#endif

// Bytes of a weight's panels.
API int64_t mpgpt_weight_bytes(const WeightArgs* args) {
    const Weight weight(*args);
    return (int64_t)weight.panels * (int64_t)weight.panel_bytes;
}

// Rows [count][inputs] of a checkpoint as outputs `first` and following.
API void mpgpt_pack(const WeightArgs* args, const float* rows, int32_t first, int32_t count) {
    const ExactFloats exact;
    const Weight weight(*args);
    Packer packer(weight);
    for (int i = 0; i < count; i++) packer.put(rows + (size_t)i * (size_t)weight.inputs, first + i);
}

API void mpgpt_rotary(const float* frequencies, int32_t half, int32_t positions, float gain, float* cosine, float* sine) {
    const ExactFloats exact;
    rotary_tables(frequencies, half, positions, gain, cosine, sine);
}

// Null where there is no memory or no thread to be had.
API Player* mpgpt_player(const PlayerArgs* args) {
    try {
        return new Player(*args);
    } catch (const std::exception&) {
        return nullptr;
    }
}

// 0, or 1 where memory for so many rows is not to be had.
API int32_t mpgpt_play(Player* player, const StepArgs* step, int32_t first, int32_t last) {
    try {
        player->play(*step, first, last);
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

// Panels of the weight of a product, by its index among the operations, as columns.
API void mpgpt_unpack(Player* player, int32_t operation, int32_t first, int32_t last, int32_t brain, void* columns) {
    player->unpack_columns(operation, first, last, brain != 0, columns);
}

// A buffer as the last range of operations left it, rows `stride` floats apart; it moves when a step has more rows.
API float* mpgpt_buffer(Player* player, int32_t id, int64_t* stride) { return player->buffer(id, *stride); }

API void mpgpt_free(Player* player) { delete player; }
