"""The life of a step: rank 0's loop and policy, the pipeline, the stages."""
