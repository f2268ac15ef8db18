# make demo   set up everything, then run the whole pipeline on the tiny weights; leaves a video, its page and demo.png
# make test   set up everything, then run all tests; with another Python: make test PYTHON=python3.13
# make test-fast  the tests that are not marked slow, of every room something: for daily work
# make sample make the committed scene folder and reference pictures again
# make tiny-weights  train the committed tiny weights again, from nothing; hours; goes on where it was interrupted
PYTHON ?= python3
BIN ?= .venv/bin
SETUP ?= .venv/installed
OUT ?= demo
# A Python of another version than the one that .venv was made with makes it anew.
version = $(shell '$1' -c 'import sys; print(sys.version_info[:2])' 2>/dev/null)
ifneq ($(origin PYTHON),file)
ifneq ($(call version,$(PYTHON)),$(call version,.venv/bin/python))
.PHONY: .venv/installed
endif
endif

# The demo. STYLE: a reference picture; PROMPT: words, none by default; STEPS, RATE and BATCH: training of its LoRA;
# TRUE_GS and GUIDANCE: of anchors and of the video, where there are words; THREADS: of the training; VIDEO: how the
# frames are filled, as measured best (docs/guidance.md). make demo VIDEO= fills them as in the paper.
STYLE := assets/references/boxtown.png
STEPS := 200
RATE := 1e-3
BATCH := 8
PROMPT :=
TRUE_GS := 2
GUIDANCE := 1
VIDEO := --num_inference_steps 10 --num_replacement 10 --degradation 0 --composite
SEED := 42
THREADS := 2
# make demo FLAGS=--overwrite after a change of RATE, BATCH, TRUE_GS or GUIDANCE, which no folder is named after
FLAGS :=
NAME = $(shell name=$$(basename '$(STYLE)'); echo "$${name%.*}")
# The folder of the anchors; sampleA has three.
RUN = $(OUT)/$(shell '$(BIN)/python' -c 'import sys; from utils.layout import anchor_run_name as name; \
	print(name(sys.argv[1], 3 * [sys.argv[2]], $(STEPS), $(SEED), 12))' '$(NAME)' '$(PROMPT)')

# OpenMP threads that spin while they wait crawl on a machine that is not idle.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-fast lint sample tiny-weights clean

demo: $(SETUP)
	'$(BIN)/python' generate.py --scene assets/sampleA --reference '$(STYLE)' --name '$(NAME)' --prompt '$(PROMPT)' \
		--seed $(SEED) --output '$(OUT)' --threads $(THREADS) --weights tiny --device cpu $(FLAGS) -- \
		--alignment.max_train_steps $(STEPS) --alignment.learning_rate $(RATE) --alignment.train_batch_size $(BATCH) \
		--anchors.true_gs $(TRUE_GS) --ggi.guidance_scale $(GUIDANCE) $(patsubst --%,--ggi.%,$(VIDEO))
	'$(BIN)/python' -m synthetic.demo --run '$(RUN)' --scene assets/sampleA --reference '$(STYLE)'

# A file stays with one worker, which shares what its tests make; one thread each. Memory that is given back and asked
# for again all the time costs glibc a fifth of the time: it keeps what it has.
demo test test-fast: export MALLOC_MMAP_MAX_ = 0
demo test test-fast: export MALLOC_TRIM_THRESHOLD_ = 8589934592
demo test test-fast: export MALLOC_TOP_PAD_ = 268435456
test test-fast: export OMP_NUM_THREADS = 1
test: CHOICE =
test-fast: CHOICE = not slow
test test-fast: $(SETUP)
	'$(BIN)/python' -m pytest -m "$(CHOICE)" -q -n auto --dist loadfile --no-loadscope-reorder

lint: $(SETUP)
	'$(BIN)/python' -m ruff check .
	'$(BIN)/python' -m ruff format --check .

sample: $(SETUP)
	'$(BIN)/python' -m synthetic.scenes --output '$(OUT)/town' --overwrite
	'$(BIN)/python' preprocess.py --scene '$(OUT)/town/scene.glb' --cameras '$(OUT)/town/cameras.json' \
		--output assets/sampleA --overwrite --preview
	'$(BIN)/python' -m synthetic.reference --overwrite

# The steps that made checkpoints/tiny, in order; see docs/tiny_weights.md.
TRAIN = '$(BIN)/python' -m synthetic.train
tiny-weights: $(SETUP)
	$(TRAIN) vae --towns 400 --max_train_steps 6000 --output_dir runs/vae
	$(TRAIN) image --vae runs/vae/checkpoint-6000/vae --towns 1110 --max_train_steps 24000 --output_dir runs/image
	$(TRAIN) video-vae --image_vae runs/vae/checkpoint-6000/vae --clips 48 --max_train_steps 1600 \
		--output_dir runs/video_vae
	$(TRAIN) video-vae --init_from runs/video_vae/checkpoint-1600 --clips 72 --max_train_steps 2600 --decay_steps 1200 \
		--learning_rate 5e-4 --train_batch_size 2 --output_dir runs/video_vae2
	$(TRAIN) video-vae --init_from runs/video_vae2/checkpoint-2600 --decoder_only --clips 32 --edge_share 0 \
		--sharpness 1 --motion 2 --max_train_steps 3200 --decay_steps 1800 --learning_rate 8e-4 \
		--train_batch_size 2 --output_dir runs/video_vae3
	'$(BIN)/python' -m synthetic.assemble --video_vae runs/video_vae3/checkpoint-3200 --output runs/start --overwrite
	'$(BIN)/python' train_ggi.py --dataset synthetic --clips 640 --from_scratch --cogvideox runs/start/cogvideox \
		--weights tiny --device cpu \
		--max_train_steps 10000 --warmup_steps 200 --decay_steps 1500 --learning_rate 1e-3 --train_batch_size 4 \
		--gradient_accumulation_steps 1 --ema_decay 0.998 --beta2 0.99 --output_dir runs/ggi
	'$(BIN)/python' -m synthetic.assemble --base runs/start --image runs/image/checkpoint-24000 \
		--inbetween runs/ggi/checkpoint-10000 --output checkpoints/tiny --overwrite
	'$(BIN)/python' -m benchmarks.memory --weights tiny

.venv/installed: $(wildcard requirements*.txt)
	'$(PYTHON)' -m venv --clear .venv
	.venv/bin/python -m pip install -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv '$(OUT)'
