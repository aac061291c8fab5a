from colab_qlora import FastLanguageModel, SFTTrainer
from transformers import TrainingArguments
from datasets import load_dataset
import torch
model, tokenizer = FastLanguageModel.from_pretrained(model_name="unsloth/llama-3-8b-Instruct-bnb-4bit", max_seq_length=2048, dtype=None, load_in_4bit=True)
model = FastLanguageModel.get_peft_model(model, r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_alpha=32, lora_dropout=0, bias="none", use_gradient_checkpointing="unsloth", random_state=42)
alpaca_prompt = """Below is an instruction that describes a task.
### Instruction:
{}
### Response:
{}"""
def format_prompts(examples):
    texts = []
    for instr, output in zip(examples["instruction"], examples["output"]):
        texts.append(alpaca_prompt.format(instr, output) + tokenizer.eos_token)
    return {"text": texts}
dataset = load_dataset("json", data_files="train.jsonl", split="train")
dataset = dataset.map(format_prompts, batched=True)
trainer = SFTTrainer(model=model, tokenizer=tokenizer, train_dataset=dataset, dataset_text_field="text", max_seq_length=2048,
    args=TrainingArguments(per_device_train_batch_size=2, gradient_accumulation_steps=4, warmup_steps=5, num_train_epochs=3, learning_rate=2e-4,
        fp16=not torch.cuda.is_bf16_supported(), bf16=torch.cuda.is_bf16_supported(), logging_steps=10, optim="adamw_8bit",
        weight_decay=0.01, lr_scheduler_type="cosine", output_dir="outputs"))
trainer_stats = trainer.train()
print(f"trained in {trainer_stats.metrics['train_runtime']:.0f} s")
