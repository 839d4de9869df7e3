// Where Core ML means to compute what: its plan for a function, counted.
//
// Knows: `MLComputePlan`.
// Must not know: what the numbers are used for.

#if canImport(CoreML)

    import CoreML
    import MPGPTNode

#endif
