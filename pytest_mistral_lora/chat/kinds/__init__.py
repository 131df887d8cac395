"""The kinds of records: one module a kind, with the object that answers what the rest of the package asks about it."""
