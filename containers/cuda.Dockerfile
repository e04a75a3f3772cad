# docker build -f containers/cuda.Dockerfile -t fewstep:cuda .
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ iproute2 procps python3-dev python3-venv wget \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/fewstep
COPY . .
# The lock's torch is the CPU build; PyPI's own one for Linux is CUDA's. Everything else is as locked.
# hadolint ignore=DL3013
RUN python3 -m venv .venv \
    && grep --invert-match --extended-regexp '^(torch|triton)==' requirements/cpu.txt > /tmp/lock.txt \
    && .venv/bin/pip install --no-cache-dir --no-deps -r /tmp/lock.txt \
    && .venv/bin/pip install --no-cache-dir -e '.[gpu,triton]'
ENV PATH=/opt/fewstep/.venv/bin:$PATH OMP_NUM_THREADS=1 RAY_USAGE_STATS_ENABLED=0

RUN useradd --create-home --uid 2000 fewstep && chown fewstep /opt/fewstep
USER 2000
ENTRYPOINT []
CMD ["fewstep", "--help"]
