//! Corpora to checkpoints: tokens, schedules, optimisers, the training loop.
