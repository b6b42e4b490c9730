#define TOPK_TARGET neon
#define TOPK_TARGET_NAME "neon"
#include "target.h"
