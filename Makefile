# `make demo` and `make test` set up all they need: a virtual environment in .venv, and Chromium for the tests.
PYTHON ?= python3
VENV := .venv
INSTALLED := $(VENV)/.installed
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: demo real test quick check audit docs install chromium golden clean

demo: install
	python scripts/demo.py

real: install
	python recipes/real-captioner/prove.py

test: install check chromium
	pytest -n 2 --dist loadfile --no-loadscope-reorder

quick: install
	pytest -n 2 --dist loadfile -m 'not slow'

check: install
	ruff check .
	ruff format --check .
	mypy
	mypy --platform win32 --cache-dir .mypy_cache/win32 vlm_export
	lint-imports --no-logo --no-cache
	python scripts/check_js.py

audit: install
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --group audit
	python scripts/audit.py

docs: install
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --group docs
	NO_MKDOCS_2_WARNING=1 mkdocs build --quiet --strict --clean

install: $(INSTALLED)

chromium:
	@for name in $${CHROMIUM:-} chromium chromium-browser google-chrome; do \
	  command -v $$name >/dev/null && exit 0; \
	done; scripts/install-debian-package chromium 'the browser test'

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null \
	  || scripts/install-debian-package python3-venv 'the virtual environment'
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/python -m pip install --quiet 'pip>=25.1'
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable . --group dev
	@# Not as the extra `fastvlm`: torchvision from PyPI does not load beside a torch for the CPU (tests/timm_alone.py).
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --no-deps timm
	touch $@

golden: install
	vlm-export golden shapes-captioner

clean:
	rm -rf build dist $(VENV)
