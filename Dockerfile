# Builds `engram` and runs it as a server:
#
#   docker build -t engram .
#   docker run -p 8000:8000 -v "$PWD/runs:/models:ro" engram serve /models/my --host 0.0.0.0
FROM rust:1.95-bookworm AS build
WORKDIR /source
COPY . .
RUN cargo build --locked --profile dist --bin engram

FROM debian:bookworm-slim
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates curl \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --system --uid 10001 --create-home engram
COPY --from=build /source/target/dist/engram /usr/local/bin/engram
USER engram
WORKDIR /home/engram
EXPOSE 8000
# For other commands than `serve`, pass --no-healthcheck.
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s \
    CMD curl --fail --silent --show-error http://127.0.0.1:8000/health || exit 1
ENTRYPOINT ["engram"]
CMD ["--help"]
