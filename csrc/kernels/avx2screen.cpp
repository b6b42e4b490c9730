#define TOPK_TARGET avx2screen
#define TOPK_TARGET_NAME "avx2screen"
#define TOPK_SCREENS
#define TOPK_OTHERWISE avx2
#include "target.h"
