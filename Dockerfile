# An image for any machine with a driver for NVIDIA GPUs, or without a GPU:
#
#   docker build -t moco .
#   docker run --gpus all --shm-size 16g -v $PWD/runs:/moco/runs moco train --config configs/quickstart.yaml
FROM python:3.12-slim
# A compiler, for model.compile.
RUN apt-get update && apt-get install -y --no-install-recommends gcc g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /moco
COPY requirements.txt requirements-extra.txt ./
RUN pip install --no-cache-dir -r requirements.txt -r requirements-extra.txt
COPY train.py eval_knn.py eval_linear.py export.py ./
COPY configs configs
COPY moco moco
ENTRYPOINT ["python", "-m", "moco"]
