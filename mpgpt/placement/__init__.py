"""Which rank runs which layers, and what that will give. numpy only."""
