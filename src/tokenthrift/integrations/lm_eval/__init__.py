"""lm-evaluation-harness: any plan, of any stage, on any of its tasks.

    python -m tokenthrift.integrations.lm_eval --model tokenthrift --tasks gsm8k \\
        --model_args 'pretrained=smollm2-135m,plan=cache=snapkv(budget=256)'

Versions of ``lm_eval`` that read the entry points ``lm_eval.models`` know the model by themselves: ``lm_eval --model
tokenthrift ...``. For older ones, 0.4.13 among them, the module above is their own command line with the model
registered. From Python: import this package, then ``lm_eval.simple_evaluate(model="tokenthrift", model_args={...})``.
"""

from .model import TokenthriftLM

__all__ = ["TokenthriftLM"]
