# Every target does its own set-up and is quick the second time. Options: VENV=elsewhere, ARGS="what pytest or the bench takes".
export VENV ?= .venv
export REDIS_SERVER ?= $(abspath $(VENV))/bin/redis-server

.DEFAULT_GOAL := help
.PHONY: help demo test check bench clean

help:  ## Show this
	@sed -n 's/^\([a-z]*\):  *## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST)

demo:  ## See it learn: the gateway before a real vLLM, on this machine's CPU
	@scripts/setup core demo
	@$(VENV)/bin/understudy demo

test:  ## Every test, on real servers
	@scripts/setup core demo redis browser node
	@$(VENV)/bin/python -m pytest $(ARGS)

check:  ## Lint, format, types, layout
	@scripts/setup core
	@scripts/check

bench:  ## What the gateway costs, ten minutes; each other script of bench/ is run by its name
	@scripts/setup core redis
	@$(VENV)/bin/python bench/gateway_load.py $(ARGS)

clean:  ## Remove what was made here, the virtual environment too (VENV= elsewhere stays)
	@rm -rf .venv .cache dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -name .git -prune -o -name __pycache__ -type d -exec rm -rf {} +
