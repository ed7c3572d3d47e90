# make quickstart: masked image modeling on real images, from nothing to a table of results
# make test:       every promise of this code, on a CPU
# make .venv:      only install; with LOCK=requirements.lock, the versions that the tests last passed with

PYTHON ?= python3
LOCK ?=
ROOT ?= fashion_mnist
RUN := .venv/bin/python -W ignore
OUT := output/quickstart

.PHONY: .venv images quickstart test lock

# as root on Debian or Ubuntu, install package $(1); otherwise say what to do about $(2)
apt = if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	apt-get update -qq && apt-get install -qq -y --no-install-recommends $(1) >/dev/null; \
	else echo "$(2): apt-get install $(1)" >&2; exit 2; fi

.venv: .venv/installed

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed, this is $$($(PYTHON) -V): make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { $(call apt,python3-venv,Python cannot make virtual environments yet); }
	@echo "installing into .venv (torch is large: some minutes)"
	@$(PYTHON) -m venv .venv
	@.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt $(if $(LOCK),-c $(LOCK))
	@touch $@

images:
	@test "$(ROOT)" != fashion_mnist || test -e /usr/share/datasets/fashion-mnist || \
		( $(call apt,dataset-fashion-mnist,Fashion-MNIST is downloaded unless its Debian package is installed) ) || true

quickstart: .venv/installed images
	@$(RUN) main_pretrain.py --config configs/quickstart/pretrain.yaml --data.root $(ROOT) --run.folder $(OUT)/pretrain
	@for task in knn linear finetune; do for weights in $(OUT)/pretrain/encoder.safetensors none; do \
		$(RUN) main_finetune.py --config configs/quickstart/$$task.yaml --data.root $(ROOT) --weights $$weights \
			--run.folder $(OUT)/$$task/$$(test $$weights = none && echo scratch || echo pretrained) || exit $$?; \
	done; done
	@$(RUN) -m util.summary $(OUT)

test: .venv/installed images
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python -m pytest -n 2 -q

# the versions in .venv, for LOCK=
lock: .venv/installed
	@.venv/bin/pip freeze --exclude-editable > requirements.lock
