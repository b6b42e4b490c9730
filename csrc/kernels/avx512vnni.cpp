#define TOPK_TARGET avx512vnni
#define TOPK_TARGET_NAME "avx512vnni"
#define TOPK_SCREENS
#include "target.h"
