//! Token ids to memory row ids: the exact addressing of Engram's hashed n-gram tables.
