# make demo   set up everything, then run the whole pipeline on the tiny weights; leaves a video
# make test   set up everything, then run all tests
# make sample make the committed scene folder and reference picture again
PYTHON ?= python3
BIN ?= .venv/bin
SETUP ?= .venv/installed
OUT ?= demo

STYLE := assets/references/boxtown.png
STEPS := 20
SEED := 42
RUN = $(OUT)/boxtown_p-e3b0c442_e$(shell printf %03d $(STEPS))_s$(shell printf %06d $(SEED))_r12_ip1
TINY := --weights tiny --device cpu

# OpenMP threads that spin while they wait crawl on a machine that is not idle.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test lint sample clean

demo: $(SETUP)
	$(BIN)/accelerate launch --num_processes 1 --main_process_port=4401 sag_distribution_alignment.py \
		--path_image $(STYLE) --pfix boxtown --max_train_steps $(STEPS) --checkpointing_steps 10 \
		--output_dir $(OUT)/loras $(TINY)
	$(BIN)/python sag_generate_anchor_view.py --epoch $(STEPS) --target assets/sampleA --pfix boxtown \
		--num_replacement 12 --seed $(SEED) --loras $(OUT)/loras --output_dir $(OUT) $(TINY)
	$(BIN)/python ggi.py --target $(RUN) --scene assets/sampleA --prompt '' $(TINY)

test: $(SETUP)
	$(BIN)/python -m pytest -m "" -q

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

sample: $(SETUP)
	$(BIN)/python -m synthetic.scenes --output $(OUT)/town --overwrite
	$(BIN)/python preprocess.py --scene $(OUT)/town/scene.glb --cameras $(OUT)/town/cameras.json \
		--output assets/sampleA --overwrite --preview
	$(BIN)/python -m synthetic.reference --overwrite

.venv/installed: requirements.txt requirements-dev.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv demo
