PYTHON := .venv/bin/python
.DEFAULT_GOAL := help
.PHONY: help protos

help: ## show this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "%-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

protos: ## generate the Python stubs and the image from the protos
	$(PYTHON) -m tools.protos generate
