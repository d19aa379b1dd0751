"""vLLM's OpenAI-compatible server on CPUs, with experts that take LoRA. Its arguments are those of `vllm serve`.

Runs in .venv-serving. vLLM starts processes that import this file again, so that all of them have the stand-in.
"""

import os
import sys

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

if "--enable-lora" in sys.argv:
    import experts_on_cpu

    experts_on_cpu.install()

if __name__ == "__main__":
    # `vllm serve` itself asks for the version of a package named vllm, where the CPU build is vllm-cpu.
    from vllm.entrypoints.launchers.api_server.entry import main

    main()
