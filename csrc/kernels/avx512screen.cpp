#define TOPK_TARGET avx512screen
#define TOPK_TARGET_NAME "avx512screen"
#define TOPK_SCREENS
#define TOPK_OTHERWISE avx512
#include "target.h"
