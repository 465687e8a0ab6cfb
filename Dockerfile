# syntax=docker/dockerfile:1
# One image for every process; the command says which. Dependencies are pinned with hashes in
# requirements/runtime.txt and installed as wheels only, so nothing is compiled.

ARG PYTHON=3.13

FROM python:${PYTHON}-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /opt/asyncflow
ENV PATH=/opt/asyncflow/bin:$PATH
WORKDIR /build
COPY requirements/runtime.txt requirements/
RUN pip install --require-hashes --only-binary :all: --requirement requirements/runtime.txt
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install --no-deps --no-build-isolation . \
    && pip uninstall --yes hatchling editables trove-classifiers  # only to build

FROM python:${PYTHON}-slim-bookworm
RUN useradd --system --uid 10001 --no-create-home --shell /usr/sbin/nologin asyncflow
COPY --from=build /opt/asyncflow /opt/asyncflow
ENV PATH=/opt/asyncflow/bin:$PATH PYTHONUNBUFFERED=1 ASYNCFLOW_LOG_FORMAT=json
# Handlers are looked up here: COPY yours in, or mount them.
WORKDIR /app
USER 10001
EXPOSE 3000
STOPSIGNAL SIGTERM
ENTRYPOINT ["asyncflow"]
CMD ["--help"]
