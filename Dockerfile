# The images of all services: `docker build --target generator --tag arbitrage/generator .`
# Targets: orchestrator, gateway, generator, prm, router, training. TORCH=cuda makes those with models for GPUs.
ARG BASE_IMAGE=docker.io/library/python:3.11.14-slim-bookworm

# hadolint ignore=DL3006
FROM ${BASE_IMAGE} AS base
# /tmp is the only place that a service writes to.
ENV PATH=/opt/arbitrage/bin:${PATH} HOME=/tmp PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1

FROM base AS build
# What is delivered has no installer: that stands in an environment of its own.
RUN python3 -m venv /opt/installer && python3 -m venv --without-pip /opt/arbitrage
ENV PATH=/opt/installer/bin:${PATH} PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# A mirror of the package index, for every stage below; files are the same by their hashes.
ARG PIP_INDEX_URL
WORKDIR /build
COPY locks/ locks/

FROM build AS project
RUN pip install --no-deps --require-hashes --requirement locks/build.txt
COPY pyproject.toml README.md LICENSE ./
COPY arbitrage/ arbitrage/
COPY services/ services/
COPY router_training/ router_training/
COPY model_packs/ model_packs/
COPY benchmarks/ benchmarks/
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /wheels .

# Lists what an image contains.
FROM build AS lister
RUN pip install --no-deps --require-hashes --requirement locks/sbom.txt

# torch is no part of the locks of models: its build for CPU lies with its makers, and that for
# CUDA brings gigabytes along.
FROM build AS torch
ARG TORCH=cpu
ARG TORCH_WHEELS=https://download.pytorch.org/whl/cpu/torch/
RUN locks/torch "${TORCH}"

FROM build AS orchestrator-installed
COPY --from=lister /opt/installer /opt/lister
COPY --from=project /wheels /wheels
RUN locks/install orchestrator

FROM build AS gateway-installed
COPY --from=lister /opt/installer /opt/lister
COPY --from=project /wheels /wheels
RUN locks/install gateway

FROM torch AS generator-installed
COPY --from=lister /opt/installer /opt/lister
COPY --from=project /wheels /wheels
RUN locks/install generator

FROM torch AS judge-installed
COPY --from=lister /opt/installer /opt/lister
COPY --from=project /wheels /wheels
RUN locks/install judge

FROM torch AS training-installed
COPY --from=lister /opt/installer /opt/lister
COPY --from=project /wheels /wheels
RUN locks/install training

FROM base AS runtime
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Arbitrage" \
      org.opencontainers.image.description="Step-level speculative reasoning, routed by predicted advantage" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# A container that listens on its loopback alone serves nobody.
ENV ARBITRAGE_HOST=0.0.0.0
# Where pulled models go, if a volume is put there.
RUN install --directory --owner=10001 --group=10001 /models
WORKDIR /tmp
USER 10001:10001

FROM runtime AS orchestrator
COPY --from=orchestrator-installed /opt/arbitrage /opt/arbitrage
CMD ["python", "-m", "services.orchestrator"]

FROM runtime AS gateway
COPY --from=gateway-installed /opt/arbitrage /opt/arbitrage
CMD ["python", "-m", "services.gateway"]

FROM runtime AS generator
COPY --from=generator-installed /opt/arbitrage /opt/arbitrage
CMD ["python", "-m", "services.generator"]

FROM runtime AS prm
COPY --from=judge-installed /opt/arbitrage /opt/arbitrage
CMD ["python", "-m", "services.prm"]

FROM runtime AS router
COPY --from=judge-installed /opt/arbitrage /opt/arbitrage
CMD ["python", "-m", "services.router"]

FROM runtime AS training
COPY --from=training-installed /opt/arbitrage /opt/arbitrage
CMD ["python", "-m", "router_training", "--help"]
