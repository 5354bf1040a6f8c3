//! What becomes of a request's body that nobody reads. A server that answers early (a body that is too long, a wrong
//! key, an unknown address) and closes while the client still sends makes the system reset the connection, and the
//! client loses the answer. So the rest is read and dropped, within limits.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body as HttpBody, Bytes};
use axum::http::{Request, header};
use http_body_util::BodyExt;
use hyper::body::{Body, Frame, SizeHint};

/// Bytes of an unread body that are read at most; a client that sends more is cut off.
const MOST: usize = 64 << 20;

/// A body whose rest is read in the background when it is dropped early.
pub(crate) struct Drained {
    body: HttpBody,
    patience: Duration,
    /// Whether the client waits to be asked for its body, and was not asked yet.
    held_back: bool,
}

impl Drained {
    /// `request` with a body that is read to its end in any case, for at most `patience`.
    pub(crate) fn wrap(request: Request<HttpBody>, patience: Duration) -> Request<HttpBody> {
        let held_back = request.headers().contains_key(header::EXPECT);
        request.map(|body| HttpBody::new(Self { body, patience, held_back }))
    }
}

impl Body for Drained {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        self.held_back = false;
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Drained {
    fn drop(&mut self) {
        if self.held_back || self.body.is_end_stream() {
            return;
        }
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let (body, patience) = (std::mem::take(&mut self.body), self.patience);
        runtime.spawn(tokio::time::timeout(patience, discard(body)));
    }
}

/// Reads to the end, to an error, or to the limit.
async fn discard(mut body: HttpBody) {
    let mut read = 0;
    while let Some(Ok(frame)) = body.frame().await {
        read += frame.data_ref().map_or(0, Bytes::len);
        if read > MOST {
            return;
        }
    }
}
