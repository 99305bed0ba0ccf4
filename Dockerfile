# syntax=docker/dockerfile:1
# Two images from one file:
#   docker build --target registry -t loraplex-registry .
#   docker build --target server   -t loraplex-server .        (add --build-arg TORCH_INDEX=… to choose torch's build)

ARG PYTHON_IMAGE=python:3.11-slim-bookworm

# --- the project as one wheel -----------------------------------------------------------------------------------------
FROM ${PYTHON_IMAGE} AS wheel
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY registry registry
COPY server server
COPY trainer trainer
COPY clients/python clients/python
RUN --mount=type=cache,target=/root/.cache/pip pip wheel --no-deps --wheel-dir /wheels .

# --- virtual environments: light for the registry, with torch for the server ------------------------------------------
FROM ${PYTHON_IMAGE} AS registry-environment
COPY constraints.txt /
COPY --from=wheel /wheels /wheels
RUN --mount=type=cache,target=/root/.cache/pip \
    python -m venv /opt/loraplex \
    && wheel="$(echo /wheels/loraplex-*.whl)" \
    && /opt/loraplex/bin/pip install --constraint /constraints.txt "${wheel}[postgres,object-store,signing]"

FROM registry-environment AS server-environment
# Empty: PyPI's torch, which runs on CUDA and on the CPU. https://download.pytorch.org/whl/cpu is 2 GB smaller.
ARG TORCH_INDEX=""
RUN --mount=type=cache,target=/root/.cache/pip \
    if [ -n "${TORCH_INDEX}" ]; then \
      /opt/loraplex/bin/pip install --constraint /constraints.txt --index-url "${TORCH_INDEX}" torch; \
    fi \
    && wheel="$(echo /wheels/loraplex-*.whl)" \
    && /opt/loraplex/bin/pip install --constraint /constraints.txt "${wheel}[serve,signing]"
# The kernels for CPUs with AMX or AVX-512, left beside their sources; the compiler stays behind in this stage. The machine
# that builds needs neither, and on another architecture than x86-64 there are none. Any gcc from 11 on will do.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/* \
    && /opt/loraplex/bin/python -m loraplex_server.kernels.native

# --- what both images share: a numeric user, and writes under /data and /tmp alone ------------------------------------
FROM ${PYTHON_IMAGE} AS runtime
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
ENV PATH=/opt/loraplex/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/tmp \
    HF_HOME=/data/huggingface \
    LORAPLEX_HOME=/data/loraplex
RUN install --directory --owner=10001 --group=10001 --mode=0770 /data
USER 10001:10001
WORKDIR /data
VOLUME /data

# In a container nobody reaches the loopback address: both listen everywhere, and what is published decides who connects.
FROM runtime AS registry
LABEL org.opencontainers.image.title="loraplex-registry" \
      org.opencontainers.image.description="Versions and aliases of LoRA adapters."
COPY --from=registry-environment /opt/loraplex /opt/loraplex
EXPOSE 8100
HEALTHCHECK --interval=10s --timeout=5s --start-period=15s \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8100/health', timeout=4)"]
ENTRYPOINT ["registry", "serve", "--host", "0.0.0.0"]

FROM runtime AS server
LABEL org.opencontainers.image.title="loraplex-server" \
      org.opencontainers.image.description="Many LoRA adapters over one base model, chosen per request."
COPY --from=server-environment /opt/loraplex /opt/loraplex
EXPOSE 8000
# The base is loaded before the port opens: a large one is downloaded first.
HEALTHCHECK --interval=10s --timeout=5s --start-period=30m \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["loraplex", "serve", "--host", "0.0.0.0"]
