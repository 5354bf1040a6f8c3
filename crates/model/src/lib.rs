//! Rows and tokens to logits: the Engram memory module and its transformer backbone, on Burn.
