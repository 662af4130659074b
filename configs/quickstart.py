"""MetaCanvas in minutes on two CPU cores, in the shapes world (no downloads).

    python train.py --config configs/quickstart.py --workdir runs/quickstart

The paper's Section 5.1 in small: a SANA-shaped DiT from scratch in pixel space (space to depth, no
autoencoder), the frozen tiny Qwen2.5-VL that ships with the package, canvas and context connectors.
Before it draws, the MLLM writes a plan; its canvas tokens come after that. Ends with score.json:
GenEval's six categories on prompts of the train split and of held-out shape-colour pairs. Some
eleven minutes; 0.96 and 0.90 with seed 0, 0.01 and 0.01 without canvas.

Variants: `sana` (default), `no_canvas` (the same without canvas tokens), `metaquery` (queries
beside the text instead of canvas tokens), `no_plan` (the paper's empty response), `flux` (editing:
the MLLM sees the picture, which a FLUX-shaped DiT has beside its target; 13 minutes, 0.34 and 0.23)
and `flux_no_canvas` (0.18 and 0.15); `wan` (six tasks of pictures and clips, three keyframes of
canvas, from a small Wan that ships with the package), `wan_no_canvas` and `wan_one_keyframe`.
"""

from ml_collections import ConfigDict


def sana(config: ConfigDict) -> None:
    """The whole method, with a LoRA on the MLLM for canvas tokens (Appendix B.5)."""
    _canvas_lora(config)


def _canvas_lora(config: ConfigDict) -> None:
    config.mllm.lora.update(rank=32, alpha=32.0, dropout=0.05)
    config.trainable += (r'mllm/.*/lora/[ab]',)


def _adamw(config: ConfigDict) -> None:
    """Instead of Muon."""
    config.steps = 1600
    config.optimizer.update(kind='adamw', matrix_lr=0.0, cooldown_steps=800)
    config.sample.every = 800


def no_canvas(config: ConfigDict) -> None:
    """The baseline: the MLLM speaks to the DiT through its text interface alone."""
    config.canvas.fuse = 'none'
    config.mllm.lora.rank = 0
    config.trainable = ('context/.*', 'backbone/.*')


def metaquery(config: ConfigDict) -> None:
    """MetaQuery: as many queries as the canvas has tokens, through the text interface."""
    config.canvas.fuse = 'none'
    config.queries = dict(count=16, attention='causal', head_dim=32, scale=1.0)
    config.trainable = ('context/.*', 'backbone/.*')


def flux(config: ConfigDict) -> None:
    """Editing with a FLUX-shaped DiT: the MLLM sees the picture, which stands beside the target."""
    _adamw(config)
    config.backbone = dict(
        kind='flux',
        remat='full',
        in_channels=48,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=128,
        pooled_projection_dim=8,
        axes_dims_rope=(8, 12, 12),
    )
    config.vae.stride = 2
    config.pooled_encoder = dict(kind='stored', width=8)
    config.weights.pooled_encoder = 'random'
    config.prompt.buckets = (72, 128)
    # Nothing before the instruction: the DiT has the picture itself.
    config.context.skip = 33
    config.flow.embedded_guidance = 1.0
    config.canvas.grid = (3, 3)
    config.data.size = 24
    config.data.tasks = dict(edit=1.0)
    config.sample.update(guidance=1.0, embedded_guidance=1.0, temperature=0.0)
    config.evaluate.kind = 'edits'


def flux_no_canvas(config: ConfigDict) -> None:
    """The baseline of editing."""
    flux(config)
    no_canvas(config)


def wan(config: ConfigDict) -> None:
    """Six tasks of pictures and clips with a Wan-shaped DiT, as stage 3 (Section 5.3) in small."""
    _canvas_lora(config)
    config.batch_size = 32
    config.video_batch_size = 8
    config.weights.mllm = 'tiny_qwen_clips'  # which plans clips too
    config.weights.backbone = 'tiny_wan/backbone'
    config.weights.context_connector = 'tiny_wan/context_connector'
    config.backbone = dict(
        kind='wan',
        remat='full',
        in_channels=12 + 12 + 4,  # noisy, condition, mask
        out_channels=12,
        num_attention_heads=4,
        attention_head_dim=32,
        num_layers=4,
        ffn_dim=384,
        freq_dim=128,
        text_dim=128,
        patch_size=2,
        eps=1e-6,
        text_embedder='none',
    )
    config.vae.stride = 2
    config.prompt.update(plan_tokens=36, buckets=(56, 72, 96, 112, 128), pictures=(1, 2, 3, 4))
    config.context.skip = 14
    config.canvas.update(grid=(3, 3), keyframes=3, frame_seconds=1 / 4)
    config.data.update(size=24, frames=5, fps=4.0, references=2, text_dropout=0.0)
    config.data.tasks = dict(t2i=0.2, edit=0.15, t2v=0.2, i2v=0.15, v2v=0.15, r2v=0.15)
    config.steps = 900
    config.optimizer.update(lr=1e-3, matrix_lr=4e-3, cooldown_steps=800)
    # What draws already shall keep it, while what is new learns ten times as fast.
    config.optimizer.factors = (('(context|backbone)/.*', 0.1),)
    config.sample.update(every=900, steps=12, guidance=1.0, temperature=0.0)
    config.evaluate.update(kind='six_tasks', per_category=16, batch_size=16)


def wan_no_canvas(config: ConfigDict) -> None:
    """The baseline of the six tasks."""
    wan(config)
    no_canvas(config)


def wan_one_keyframe(config: ConfigDict) -> None:
    """Table 6's canvas of a picture, spread over all frames."""
    wan(config)
    config.canvas.keyframes = 1


def no_plan(config: ConfigDict) -> None:
    """The paper's prompt: an empty response stands before the canvas."""
    _canvas_lora(config)
    config.prompt.update(plan_tokens=0, buckets=(40, 64, 128))


VARIANTS = {
    'sana': sana,
    'no_canvas': no_canvas,
    'metaquery': metaquery,
    'no_plan': no_plan,
    'flux': flux,
    'flux_no_canvas': flux_no_canvas,
    'wan': wan,
    'wan_no_canvas': wan_no_canvas,
    'wan_one_keyframe': wan_one_keyframe,
}


def get_config(variant: str = 'sana') -> ConfigDict:
    config = ConfigDict()
    config.objective = 'flow'
    config.seed = 0
    config.steps = 600
    config.batch_size = 32
    config.accumulate = 1
    config.dtype = 'float32'
    config.mesh = dict(data=-1, fsdp=1, tensor=1)
    config.weights = dict(mllm='tiny_qwen')
    config.trainable = ('context/.*', 'canvas/.*', 'backbone/.*')

    config.mllm = dict(
        kind='qwen2_5_vl',
        size='tiny',
        remat='full',
        lora=dict(rank=0, alpha=0.0, dropout=0.0),
    )
    config.prompt = dict(
        tokenizer='tiny_qwen',
        buckets=(56, 128),
        plan_tokens=24,
        max_text=None,
        pictures=(1,),
        windows=(4,),
        min_pixels=64 * 64,
        max_pixels=64 * 64,
    )
    config.context = dict(
        kind='mllm',
        hidden=256,
        activation='gelu_tanh',
        dropout=0.0,
        skip=23,
    )
    config.canvas = dict(
        fuse='dit',
        time='adaln',
        align='transformer',
        positions='mrope',
        attention='causal',
        keyframes=1,
        grid=(4, 4),
        stride=2,
        frame_seconds=0.0,
        head_dim=32,
    )
    config.backbone = dict(
        kind='sana',
        lora=dict(rank=0, alpha=0.0, dropout=0.0),
        remat='full',  # recomputing is faster than moving memory on two cores
        in_channels=48,
        num_attention_heads=4,
        attention_head_dim=32,
        num_layers=4,
        num_cross_attention_heads=4,
        caption_channels=128,
        mlp_ratio=2.5,
        patch_size=1,
        qk_norm=None,
    )
    config.vae = dict(kind='pixel', stride=4)
    config.flow = dict(train_shift=4.0)

    config.data = dict(
        source='shapes',
        seed=1,
        size=32,
        tasks=dict(t2i=1.0),
        text_dropout=0.1,
        threads=1,
        prefetch=4,
    )
    config.optimizer = dict(
        kind='muon',  # the paper's AdamW wants 1,600 steps
        lr=2e-3,
        matrix_lr=8e-3,
        warmup_lr=1e-5,
        warmup_steps=50,
        cooldown_steps=420,
        b1=0.9,
        b2=0.99,
        eps=1e-8,
        weight_decay=0.1,  # pairs that were never seen: 0.72 becomes 0.79 where an oracle plans
        clip=1.0,
        ema=0.995,
    )
    config.checkpoint = dict(every=250, keep=2, keep_every=None)
    config.log = dict(every=25, tensorboard=False)
    config.sample = dict(
        every=300,
        count=12,
        prompts=(),
        solver='euler',
        steps=12,
        shift=3.0,
        guidance=1.25,
        temperature=0.5,  # plans differ from seed to seed, and are right
    )
    config.evaluate = dict(kind='shapes', per_category=32, batch_size=48)
    VARIANTS[variant](config)
    return config
