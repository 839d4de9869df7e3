// The compute units of this device: Core ML's, the fastest first.
//
// Knows: where they come from.
// Must not know: what they are, when one is tried.

import MPGPTCoreML
import MPGPTNode

/// Compiled packages are kept in a folder, beside the packages.
func computeUnits(in folder: String) -> [ComputeUnit] {
    ComputeUnit.coreML(folder: folder)
}
