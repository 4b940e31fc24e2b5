"""The recurrence and a layer's other operations, on every backend (docs/architecture.md)."""
