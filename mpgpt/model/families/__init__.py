"""The families of models: what each calls its tensors, and what its layers are."""
