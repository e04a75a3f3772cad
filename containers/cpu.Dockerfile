# docker build -f containers/cpu.Dockerfile -t fewstep:cpu .
FROM python:3.11-slim-bookworm

# g++: DeepSpeed compiles its CPU operator on first use. iproute2, procps: for people who look inside.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ iproute2 make procps wget \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/fewstep
COPY . .
RUN make install
ENV PATH=/opt/fewstep/.venv/bin:$PATH OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE RAY_USAGE_STATS_ENABLED=0

RUN useradd --create-home --uid 1000 fewstep && chown fewstep /opt/fewstep
USER 1000
ENTRYPOINT []
CMD ["fewstep", "--help"]
