"""What a person types: the only place that knows every kind of part."""
