//! Row ids to rows: formats, tables, gathering and row-sparse training of Engram's memory.
