#define TOPK_TARGET baseline
#define TOPK_TARGET_NAME "baseline"
#include "target.h"
