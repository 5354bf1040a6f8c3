//! Products with weights that all tokens see.

use burn::tensor::{DType, Tensor};

use super::fused::choose;
use super::token_sums;

/// [`product`] of the rows of all tokens, `[tokens, in]`, with a weight, `[in, out]`.
pub(crate) fn rows_product(x: Tensor<2>, w: Tensor<2>, bf16: bool) -> Tensor<2> {
    let whole = |(x, w): (Tensor<2>, Tensor<2>)| product(x, w, bf16);
    let in_parts = |(x, w): (Tensor<2>, Tensor<2>)| {
        let ([tokens, input], [_, output]) = (x.dims(), w.dims());
        let parts = token_sums::parts(tokens, PRODUCT_PARTS);
        let x = x.reshape([parts, tokens / parts, input]);
        product(x, w.unsqueeze(), bf16).reshape([tokens, output])
    };
    choose(&x.device(), (x, w), whole, in_parts)
}

/// `x + bias`, `[tokens, width]` and `[width]`.
pub(crate) fn add_bias(x: Tensor<2>, bias: Tensor<1>) -> Tensor<2> {
    let tokens = x.dims()[0];
    let every_token = |bias: Tensor<1>| token_sums::for_every_token(bias, tokens);
    let bias = choose(&x.device(), bias, |bias: Tensor<1>| bias.unsqueeze(), every_token);
    x + bias
}

/// Products that a weight's gradient is the sum of.
const PRODUCT_PARTS: usize = 16;

/// `x·w`, in bf16 if asked, back in f32.
pub(crate) fn product<const D: usize>(x: Tensor<D>, w: Tensor<D>, bf16: bool) -> Tensor<D> {
    if bf16 { x.cast(DType::BF16).matmul(w.cast(DType::BF16)).cast(DType::F32) } else { x.matmul(w) }
}
