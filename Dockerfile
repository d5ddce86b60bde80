# syntax=docker/dockerfile:1

# Two images from one file:
#
#   docker build -t llmc .                           runs artifacts: `serve`, `run`, `rag`, `eval`, `bench`
#   docker build -t llmc:compile --target compile .  compiles models too (torch, transformers, TVM: some 2 GB)
#
# Python 3.11 is what .ci/constraints.txt, the versions that were tested together, was made with.
ARG PYTHON=3.11

# The environment is built where pip is, and copied to where it is not needed.
FROM python:${PYTHON}-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv --without-pip /opt/llmc
WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE ./
COPY .ci/constraints.txt .ci/constraints.txt
COPY llmc llmc
COPY ir ir
COPY frontend frontend
COPY passes passes
COPY codegen codegen
COPY runtime runtime
COPY plugins plugins
COPY cli cli
RUN pip --python /opt/llmc/bin/python install --constraint .ci/constraints.txt ".[rag]"

FROM build AS build-compile
# From PyTorch's own index first: its wheels for CPUs hold no CUDA libraries (2 GB less).
RUN pip --python /opt/llmc/bin/python install --constraint .ci/constraints.txt \
        --extra-index-url https://download.pytorch.org/whl/cpu ".[compile,rag]"

# What both images are: the environment, a user without rights, a folder for what is found out about artifacts.
FROM python:${PYTHON}-slim AS base
RUN useradd --system --uid 10001 --home-dir /var/cache/llmc --create-home --shell /usr/sbin/nologin llmc
ENV PATH=/opt/llmc/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    XDG_CACHE_HOME=/var/cache/llmc
USER 10001:10001
WORKDIR /models
VOLUME /models
ENTRYPOINT ["llmc"]

FROM base AS compile
COPY --from=build-compile /opt/llmc /opt/llmc
CMD ["doctor"]

# The last one is what `docker build` makes without --target.
FROM base AS serve
COPY --from=build /opt/llmc /opt/llmc
EXPOSE 8000
# A model of some gigabytes is read and hashed before the first answer.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
CMD ["serve", "/models/model.llmc", "--host", "0.0.0.0", "--port", "8000"]
